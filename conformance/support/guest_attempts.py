"""Runs *inside* a sandbox, as root: one attempt to reach something, whatever it takes.

Argument: JSON {"how": NAME, "args": [...], "named": {...}, "wait": SECONDS}. Prints what the guest saw, one word or a
few: `ok…` when something answered, `none` when nothing did. Whether a packet arrived the other end knows.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import sys

# Seconds for an answer. Nothing shows sooner that there is none.
WAIT = 10.0
TAP_MAC = bytes.fromhex("02fc00000006")
OWN_MAC = bytes.fromhex("02fc00000005")
OWN_IP = "169.254.0.21"


def connect(ip, port, wait=None):
    return socket.create_connection((ip, port), timeout=wait or WAIT)


def tcp(ip, port, data="hello\n"):
    """A line to an echo server, or whatever it is."""
    with connect(ip, port) as s:
        s.sendall(data.encode())
        got = s.recv(100)
        return "ok" if got == data.encode() else ("other " + got.decode(errors="replace") if got else "closed")


def silent(ip, port):
    """Connects, says nothing, and waits until the other side ends it."""
    with connect(ip, port, 20) as s:
        return "ok" if s.recv(1) else "closed"


def raw(ip, port, hex):
    with connect(ip, port) as s:
        s.settimeout(4)
        s.sendall(bytes.fromhex(hex))
        got = s.recv(4096)
        return f"got {got[:60]!r}" if got else "closed"


def responses(s, count):
    """Status codes and bodies, one after another."""
    stream, seen = s.makefile("rb"), []
    for _ in range(count):
        line = stream.readline()
        if not line:
            seen.append("closed")
            break
        length = 0
        while (header := stream.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        body = stream.read(length).decode(errors="replace").strip()
        code = line.split()[1].decode()
        seen.append(f"ok {body}" if code == "200" else code)
    return " / ".join(seen)


def http(ip, *requests, port=80, together=False):
    """Requests on one connection: each a text with `|` for line ends, or just a Host."""
    texts = [(r.replace("|", "\r\n") if "|" in r else f"GET / HTTP/1.1\r\nHost: {r}\r\n\r\n").encode() for r in requests]
    with connect(ip, port) as s:
        s.settimeout(6)
        if together:
            s.sendall(b"".join(texts))
            return responses(s, len(texts))
        seen = []
        for text in texts:
            s.sendall(text)
            seen.append(responses(s, 1))
        return " / ".join(seen)


def tls_context(verify):
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def https(ip, sni, host=None, port=443, verify=False, header=None):
    """TLS that asks for `sni`, and in it a request to `host`; `sni` null sends none."""
    with connect(ip, port) as s:
        s.settimeout(6)
        with tls_context(verify).wrap_socket(s, server_hostname=sni) as t:
            extra = f"{header}\r\n" if header else ""
            t.sendall(f"GET / HTTP/1.1\r\nHost: {host or sni}\r\n{extra}\r\n".encode())
            return responses(t, 1)


def fragmented(ip, sni, size=9):
    """A ClientHello over many records."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = tls_context(False).wrap_bio(incoming, outgoing, server_hostname=sni)

    def step(call):
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                flush()
                data = s.recv(16384)
                if not data:
                    raise ConnectionError
                incoming.write(data)

    first = [True]

    def flush():
        data = outgoing.read()
        if first[0] and data:
            first[0] = False
            body, records = data[5:], b""
            for at in range(0, len(body), size):
                part = body[at : at + size]
                records += b"\x16\x03\x01" + struct.pack(">H", len(part)) + part
            data = records
        if data:
            s.sendall(data)

    with connect(ip, 443) as s:
        s.settimeout(6)
        step(tls.do_handshake)
        flush()
        tls.write(f"GET / HTTP/1.1\r\nHost: {sni}\r\n\r\n".encode())
        flush()
        return "ok" if b"200 OK" in step(lambda: tls.read(4096)) else "other"


def udp(ip, port, data="hello"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect((ip, port))
        s.send(data.encode() if isinstance(data, str) else bytes(data))
        return "ok" if s.recv(65536) else "none"


def big_udp(ip, port):
    """In fragments."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.sendto(b"x" * 4000, (ip, port))
        return "ok" if len(s.recv(65536)) == 4000 else "none"


def broadcast(ip, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.settimeout(WAIT)
        s.sendto(b"hello", (ip, port))
        return f"ok {s.recvfrom(100)[1][0]}"


def udp6(ip, port):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.sendto(b"hello", (ip, port, 0, socket.if_nametoindex("eth0")))
        return "ok" if s.recv(100) else "none"


def tcp6(ip, port):
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.connect((ip, port, 0, socket.if_nametoindex("eth0")))
        return "ok"


CODES = {0: "ok", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


def dns(server, name, type=1, tcp=False, port=53):
    """The answer's code and its addresses."""
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    query = struct.pack(">HHHHHH", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", type, 1)
    if tcp:
        with connect(server, port, 4) as s:
            s.sendall(struct.pack(">H", len(query)) + query)
            stream = s.makefile("rb")
            size = stream.read(2)
            if len(size) < 2:
                return "closed"
            reply = stream.read(struct.unpack(">H", size)[0])
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(6)
            s.connect((server, port))
            s.send(query)
            reply = s.recv(65536)
    flags, _, count = struct.unpack(">HHH", reply[2:8])
    position, found = len(query), []
    for _ in range(count):
        while reply[position] and reply[position] < 0xC0:
            position += 1 + reply[position]
        position += 2 if reply[position] else 1
        kind, _, _, size = struct.unpack(">HHIH", reply[position : position + 10])
        data = reply[position + 10 : position + 10 + size]
        position += 10 + size
        if kind == 1:
            found.append(socket.inet_ntoa(data))
        elif kind == 28:
            found.append(socket.inet_ntop(socket.AF_INET6, data))
        elif kind == 16:
            found.append(data[1:].decode())
    cut = " cut" if flags & 0x0200 else ""
    shown = found if len(found) < 4 else [f"{len(found)} addresses"]
    return " ".join([CODES.get(flags & 15, "?") + cut, *shown])


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def icmp(ip):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
        s.settimeout(WAIT)
        head = struct.pack(">BBHHH", 8, 0, 0, 77, 1)
        s.sendto(struct.pack(">BBHHH", 8, 0, checksum(head), 77, 1), (ip, 0))
        while True:
            packet, peer = s.recvfrom(1000)
            if peer[0] == ip and packet[20] == 0:
                return "ok"


def protocol(ip, number):
    """Bytes in a protocol that nothing answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, number) as s:
        s.sendto(b"hello" * 8, (ip, 0))
    return "sent"


def ip_packet(source, target, proto, payload, options=b""):
    words = 5 + len(options) // 4
    head = struct.pack(">BBHHHBBH4s4s", 0x40 | words, 0, words * 4 + len(payload), 1, 0, 64, proto, 0,
                       socket.inet_aton(source), socket.inet_aton(target)) + options
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def udp_payload(port, data=b"hello"):
    return struct.pack(">HHHH", 5555, port, 8 + len(data), 0) + data


def frame(source_ip, target_ip, port=7, source_mac=None, target_mac=None, options=""):
    """A datagram as an Ethernet frame of the guest's own making."""
    mac = lambda text, default: bytes.fromhex(text) if text else default
    packet = ip_packet(source_ip, target_ip, 17, udp_payload(port), bytes.fromhex(options))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("eth0", 0))
        s.send(mac(target_mac, TAP_MAC) + mac(source_mac, OWN_MAC) + b"\x08\x00" + packet)
    return "sent"


def vlan(target_ip, port=7):
    packet = ip_packet(OWN_IP, target_ip, 17, udp_payload(port))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("eth0", 0))
        s.send(TAP_MAC + OWN_MAC + b"\x81\x00\x00\x05\x08\x00" + packet)
    return "sent"


def arp_then(claim, ip, port):
    """Says by ARP that an address is here, and then sends from it."""
    own, target = socket.inet_aton(claim), socket.inet_aton("169.254.0.22")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("eth0", 0))
        for operation in (1, 2):
            body = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, OWN_MAC, own, TAP_MAC, target)
            s.send(b"\xff" * 6 + OWN_MAC + b"\x08\x06" + body)
    return frame(claim, ip, port)


def other_address(address, ip, port):
    """Gives eth0 another address and uses that."""
    os.system(f"ip addr add {address}/32 dev eth0 2>/dev/null")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(WAIT)
            s.bind((address, 0))
            s.sendto(b"hello", (ip, port))
            return "ok" if s.recv(100) else "none"
    finally:
        os.system(f"ip addr del {address}/32 dev eth0")


def hosts_file(name, ip, sni):
    """Says in /etc/hosts that a name is somewhere else, and goes there by the name."""
    with open("/etc/hosts", "a") as hosts:
        hosts.write(f"{ip} {name}\n")
    try:
        return https(name, sni)
    finally:
        os.system(f"sed -i '/^{ip} {name}$/d' /etc/hosts")


def me(url="http://192.0.2.1/me"):
    import urllib.request

    with urllib.request.urlopen(url, timeout=5) as answer:
        return "ok " + json.loads(answer.read())["sandboxID"]


def main():
    global WAIT
    asked = json.loads(sys.argv[1])
    WAIT = asked["wait"]
    try:
        print(globals()[asked["how"]](*asked.get("args", []), **asked.get("named", {})))
    except (TimeoutError, socket.timeout):
        print("none")
    except ssl.SSLCertVerificationError as e:
        print(f"untrusted {e.verify_message}")
    except ssl.SSLError:
        print("reset")
    except OSError as e:
        print("reset" if isinstance(e, ConnectionError) else f"none ({e})")


main()
