"""Speaks NFS to the host as a guest's kernel never would: `python3 guest_nfs.py EXPORT [OTHER]`, in a guest, as root.

EXPORT is the id of a volume that this sandbox may have, or "" for none; OTHER one of somebody else's. Each attempt that got
more than it should is a line of output; the last line says how many there were.
"""

import os
import socket
import struct
import sys

HOST = ("192.0.2.1", 2049)
MOUNT, NFS = 100005, 100003
attempts = 0


def opaque(data):
    return struct.pack(">I", len(data)) + data + b"\0" * (-len(data) % 4)


class Connection:
    def __init__(self):
        self.socket = socket.create_connection(HOST, 10)
        self.socket.settimeout(10)

    def raw(self, record, header=None):
        """The answer to a record, or None when the host ended the connection."""
        try:
            self.socket.sendall((header or struct.pack(">I", len(record) | 1 << 31)) + record)
            length = struct.unpack(">I", self.read(4))[0] & 0x7FFFFFFF
            return self.read(length)
        except (OSError, EOFError, struct.error):
            return None

    def read(self, n):
        data = b""
        while len(data) < n:
            piece = self.socket.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def call(self, program, procedure, arguments, uid=0, version=3):
        who = struct.pack(">I", 0) + opaque(b"guest") + struct.pack(">III", uid, uid, 0)
        front = struct.pack(">IIIIII", 7, 0, 2, program, version, procedure)
        answer = self.raw(front + struct.pack(">I", 1) + opaque(who) + struct.pack(">II", 0, 0) + arguments)
        return answer and answer[20:]

    def mount(self, export):
        answer = self.call(MOUNT, 1, opaque(b"/" + export.encode()))
        status = struct.unpack(">II", answer[:8])
        if status != (0, 0):
            return None
        length = struct.unpack(">I", answer[8:12])[0]
        return answer[12:12 + length]


def status(answer):
    """Of an NFS call: None when it was not done at all."""
    return struct.unpack(">I", answer[4:8])[0] if answer and answer[:4] == b"\0\0\0\0" else None


def expect(what, good):
    global attempts
    attempts += 1
    if not good:
        print("got more than it should:", what)


def main(export, other):
    for name in [other, "", "..", "../../etc", "/", "x" * 1000, "handles.key"]:
        expect(f"a mount of {name!r}", name == export or Connection().mount(name) is None)
    c = Connection()
    for procedure in range(30):
        for size in (0, 4, 64, 400):
            c.raw(os.urandom(size))
            c = Connection()
            c.call(NFS, procedure, os.urandom(size))
    for header in (0x7FFFFFFF, 0xFFFFFFFF, 0x80200000, 0):
        expect(f"a record of {header:#x}", Connection().raw(b"x" * 100, struct.pack(">I", header)) is None)
    many = [Connection() for _ in range(8)]
    for m in many:
        m.socket.sendall(struct.pack(">I", 1 << 31 | 100) + b"half")
    for m in many:
        m.socket.close()
    c = Connection()
    expect("other programs", c.call(100227, 0, b"")[:4] == b"\0\0\0\1")
    for handle in (b"", os.urandom(28), os.urandom(64), b"\1\0\0\0\1" + struct.pack("<II", 2, 0) + os.urandom(16)):
        expect(f"the handle {handle!r}", status(c.call(NFS, 1, opaque(handle))) != 0)
    if not export:
        return
    root = c.mount(export)
    expect("its own root", status(c.call(NFS, 1, opaque(root))) == 0)
    for at in range(len(root)):
        changed = bytearray(root)
        changed[at] ^= 0x41
        expect(f"the root's handle with byte {at} changed", status(c.call(NFS, 1, opaque(bytes(changed)))) != 0)
    up = c.call(NFS, 3, opaque(root) + opaque(b".."))
    length = struct.unpack(">I", up[8:12])[0]
    expect("what is above the root", up[12:12 + length] == root)
    for name in (b"../etc", b"/etc", b"../handles.key", b"a\0b", b"x" * 300):
        expect(f"the name {name!r}", status(c.call(NFS, 3, opaque(root) + opaque(name))) not in (0, None))
    none = struct.pack(">IIIIII", 0, 0, 0, 0, 0, 0)
    device = struct.pack(">I", 3) + none + struct.pack(">II", 8, 0)
    expect("a device", status(c.call(NFS, 11, opaque(root) + opaque(b"disk") + device)) != 0)
    expect("a link to the host's", status(c.call(NFS, 10, opaque(root) + opaque(b"out") + none + opaque(b"/etc/shadow"))) == 0)
    link = c.call(NFS, 3, opaque(root) + opaque(b"out"))
    handle = link[12:12 + struct.unpack(">I", link[8:12])[0]]
    expect("what is behind the link", status(c.call(NFS, 6, opaque(handle) + struct.pack(">QI", 0, 100))) != 0)


main(*(sys.argv[1:] + ["", ""])[:2])
print(attempts, "attempts")
