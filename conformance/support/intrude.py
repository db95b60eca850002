"""Breaks what a running daemon relies on, from outside and as a fault would: its VMMs and their connections."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
from pathlib import Path

PIDFD_GETFD = 438  # x86_64


def vmms(daemon) -> list[int]:
    """The process ids of the daemon's VMMs."""
    done = subprocess.run(["pgrep", "-P", str(daemon.process.pid), "-f", "qemu-system|firecracker"], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def vmm(daemon) -> int:
    """The only one; start the daemon with NIDUS_WARM=0."""
    (pid,) = vmms(daemon)
    return pid


def sockets(pid: int) -> dict[int, int]:
    """The open sockets of a process: descriptor by inode."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found[int(target[8:-1])] = int(link.name)
    return found


def connections(pid: int) -> dict[int, tuple[str, int]]:
    """All connected unix sockets of the network namespace of a process: their own path ("*" for none) and their
    peer's inode, by inode. What is accepted is in the namespace of who connects."""
    listing = subprocess.run(["nsenter", "-n", "-t", str(pid), "ss", "-xnH"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in listing.splitlines():
        path, inode, _, peer = line.split()[4:8]
        found[int(inode)] = (path, int(peer))
    return found


def cut(pid: int, fds: list[int]) -> None:
    """Shuts these sockets of a process down."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for fd in fds:
            ours = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
            if ours < 0:
                raise OSError(ctypes.get_errno(), f"pidfd_getfd({pid}, {fd})")
            with socket.socket(fileno=ours) as mine:
                mine.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)


def qemu_disk(daemon) -> tuple[int, list[int]]:
    """The connection of a QEMU's disk, as process and descriptors."""
    pid = vmm(daemon)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    return pid, [int(re.search(r'"type":"fd","str":"(\d+)"', command).group(1))]


def kernel_disk(daemon) -> tuple[int, list[int]]:
    """The daemon's ends of the connections that the kernel has: their other ends are nobody's."""
    everybody = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            everybody.update(sockets(int(process.name)))
        except (FileNotFoundError, ProcessLookupError):
            continue
    links = connections(daemon.process.pid)
    mine = sockets(daemon.process.pid).items()
    return daemon.process.pid, [fd for inode, fd in mine if inode in links and links[inode][1] not in everybody | {0}]


def served_memory(daemon) -> tuple[int, list[int]]:
    """The daemon's end of the connection over which a Firecracker handed its memory over: of those between
    the two, the one that the Firecracker made."""
    theirs, links = sockets(vmm(daemon)), connections(vmm(daemon))
    mine = sockets(daemon.process.pid).items()
    return daemon.process.pid, [
        fd for inode, fd in mine if inode in links and links[inode][0] != "*" and links[inode][1] in theirs
    ]
