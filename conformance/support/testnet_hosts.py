"""The hosts of the test net; runs in its namespace. Argument: the folder of certificates and of the log.

Each line of the log is one thing that reached a host:
  {"what": "packet", "to": IP, "proto": N, "port": N or null}      every packet on the wire, of TCP the first of a connection
  {"what": "http", "host": "good"|"evil", "tls": bool, "asked": Host, "headers": {...}, "path": P}
  {"what": "dns", "at": IP, "name": N, "type": T, "tcp": bool}
  {"what": "socks", "to": "IP:PORT", "user": U}
"""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .testnet import DNS, EVIL, FOREIGN_DNS, GOOD, PRIVATE, PUBLIC_RESOLVER, SOCKS

folder = Path(sys.argv[1])
lock = threading.Lock()
log = open(folder / "arrived.jsonl", "a", buffering=1)

A, CNAME, TXT, AAAA, HTTPS = 1, 5, 16, 28, 65
ZONE = {
    "good.test": GOOD, "api.good.test": GOOD, "evil.test": EVIL, "wild.test": EVIL, "proxy.test": SOCKS,
    "rebind.test": PRIVATE[0], "loop.test": "127.0.0.1", "meta.test": PRIVATE[4],
}


def note(**event) -> None:
    with lock:
        log.write(json.dumps(event) + "\n")


def packets() -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    while True:
        packet, address = wire.recvfrom(65536)
        if address[2] == socket.PACKET_OUTGOING or address[0] != "net0" or len(packet) < 20:
            continue
        header = (packet[0] & 15) * 4
        proto, first = packet[9], not struct.unpack(">H", packet[6:8])[0] & 0x1FFF
        port = struct.unpack(">H", packet[header + 2 : header + 4])[0] if proto in (6, 17) and first else None
        # Of TCP what opens a connection: the end of an earlier one may come at any time.
        if proto == 6 and first and packet[header + 13] & 0x12 != 0x02:
            continue
        note(what="packet", to=socket.inet_ntoa(packet[16:20]), proto=proto, port=port)


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name, tls = "", False

    def log_message(self, *args):
        pass

    def do_GET(self):
        note(what="http", host=self.name, tls=self.tls, asked=self.headers.get("Host"), path=self.path,
             headers={k.lower(): v for k, v in self.headers.items()})
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        body = f"I am {self.name}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_GET


def web(ip: str, port: int, name: str, tls: bool) -> None:
    handler = type("Of", (Web,), {"name": name, "tls": tls})

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self):
            # Without the host's name, which would be asked for here.
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = ip, port

        def finish_request(self, request, client_address):
            if tls:
                request.settimeout(20)
                request = context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)

        def handle_error(self, request, client_address):
            pass

    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    serve(Server((ip, port), handler))


def serve(server) -> None:
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Threaded(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True

    def handle_error(self, request, client_address):
        pass


def echo_udp(ip: str, port: int) -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((ip, port))

    def loop():
        while True:
            data, peer = udp.recvfrom(65536)
            udp.sendto(data, peer)

    threading.Thread(target=loop, daemon=True).start()


def labels(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part) + b"\0"


def answer(query: bytes, at: str, tcp: bool) -> bytes:
    """RFC 1035 as far as the zone needs it."""
    position, parts = 12, []
    while query[position]:
        parts.append(query[position + 1 : position + 1 + query[position]].decode("ascii", "replace"))
        position += 1 + query[position]
    kind = struct.unpack(">H", query[position + 1 : position + 3])[0]
    question, name = query[12 : position + 5], ".".join(parts).lower()
    note(what="dns", at=at, name=name, type=kind, tcp=tcp)
    records = []

    def add(owner: str, kind: int, data: bytes):
        records.append(labels(owner) + struct.pack(">HHIH", kind, 1, 1, len(data)) + data)

    ip = ZONE.get(name) or (GOOD if name.endswith(".wild.test") else None)
    truncated = 0
    if name == "cname.test":
        add(name, CNAME, labels("good.test"))
        if kind == A:
            add("good.test", A, socket.inet_aton(GOOD))
    elif name == "big.test" and kind == A:
        if tcp:
            for n in range(100, 200):
                add(name, A, socket.inet_aton(f"198.51.100.{n}"))
        else:
            truncated = 0x0200
    elif ip and kind == A:
        add(name, A, socket.inet_aton(ip))
    elif ip and kind == AAAA:
        add(name, AAAA, socket.inet_pton(socket.AF_INET6, "2001:db8::1"))
    elif ip and kind == TXT:
        add(name, TXT, b"\x05hello")
    code = 0 if records or ip or truncated else 3
    return query[:2] + struct.pack(">HHHHH", 0x8180 | truncated | code, 1, len(records), 0, 0) + question + b"".join(records)


def resolver(ip: str, port: int) -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((ip, port))

    def loop():
        while True:
            query, peer = udp.recvfrom(65536)
            try:
                udp.sendto(answer(query, ip, False), peer)
            except (IndexError, struct.error):
                note(what="dns", at=ip, name=query.hex(), type=0, tcp=False)

    class Tcp(socketserver.BaseRequestHandler):
        def handle(self):
            stream = self.request.makefile("rb")
            while len(size := stream.read(2)) == 2:
                query = stream.read(struct.unpack(">H", size)[0])
                reply = answer(query, ip, True)
                self.request.sendall(struct.pack(">H", len(reply)) + reply)

    threading.Thread(target=loop, daemon=True).start()
    serve(Threaded((ip, port), Tcp))


class Socks(socketserver.BaseRequestHandler):
    """RFC 1928 and 1929: user `me`, password `secret`."""

    def handle(self):
        stream = self.request.makefile("rb")
        version, count = stream.read(2)
        methods = stream.read(count)
        if 2 not in methods:
            self.request.sendall(b"\x05\xff")
            return
        self.request.sendall(b"\x05\x02")
        _, length = stream.read(2)
        user = stream.read(length).decode()
        password = stream.read(stream.read(1)[0]).decode()
        if (user, password) != ("me", "secret"):
            self.request.sendall(b"\x01\x01")
            return
        self.request.sendall(b"\x01\x00")
        _, _, _, kind = stream.read(4)
        assert kind == 1
        ip, port = socket.inet_ntoa(stream.read(4)), struct.unpack(">H", stream.read(2))[0]
        note(what="socks", to=f"{ip}:{port}", user=user)
        with socket.create_connection((ip, port), timeout=20) as there:
            self.request.sendall(b"\x05\x00\x00\x01" + bytes(6))
            back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
            back.start()
            pump(stream, there)
            back.join()


def pump(source, target) -> None:
    read = source.recv if isinstance(source, socket.socket) else source.read1
    try:
        while data := read(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def main() -> None:
    threading.Thread(target=packets, daemon=True).start()
    for ip, name in ((GOOD, "good"), (EVIL, "evil")):
        web(ip, 80, name, False)
        web(ip, 8080, name, False)
        web(ip, 443, name, True)
        web(ip, 8443, name, True)
        serve(Threaded((ip, 7), Echo))
        for port in (7, 443):
            echo_udp(ip, port)
    for ip in PRIVATE:
        web(ip, 80, "private", False)
        serve(Threaded((ip, 7), Echo))
        echo_udp(ip, 7)
    resolver(DNS, 53)
    for ip in (FOREIGN_DNS, PUBLIC_RESOLVER):
        resolver(ip, 53)
    resolver(FOREIGN_DNS, 5353)
    resolver(FOREIGN_DNS, 853)
    serve(Threaded((SOCKS, 1080), Socks))
    print("ready", flush=True)
    threading.Event().wait()


main()
