"""Runs *inside* a sandbox: tries to reach addresses that it must not reach.

Arguments: seconds to wait for answers, then targets as `tcp:HOST:PORT` or `udp:HOST:PORT`.
TCP targets are tried all at once; those that accepted, and those that answered with a reset, are
printed as JSON {"connected": [...], "refused": [...]}. To UDP targets one datagram is sent: the
listener on the host tells whether it arrived.
"""

import errno
import json
import select
import socket
import sys
import time

deadline = time.monotonic() + float(sys.argv[1])
waiting = {}
connected, refused = [], []
poll = select.poll()


def settle(target, error):
    if error == 0:
        connected.append(target)
    elif error == errno.ECONNREFUSED:
        refused.append(target)


for target in sys.argv[2:]:
    kind, host, port = target.split(":")
    if kind == "udp":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                s.sendto(b"probe", (host, int(port)))
            except OSError:
                pass
        continue
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.setblocking(False)
    error = s.connect_ex((host, int(port)))
    if error == errno.EINPROGRESS:
        waiting[s.fileno()] = (s, target)
        poll.register(s, select.POLLOUT)
    else:
        settle(target, error)
        s.close()

while waiting and (left := deadline - time.monotonic()) > 0:
    for fd, _ in poll.poll(left * 1000):
        s, target = waiting.pop(fd)
        poll.unregister(fd)
        settle(target, s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        s.close()

print(json.dumps({"connected": sorted(connected), "refused": sorted(refused)}))
