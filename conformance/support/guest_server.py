"""An HTTP and WebSocket server made of the standard library alone; it runs *inside* a sandbox.

Everything that shows streaming is causal, not timed: `/sse` sends its second event only after
somebody else asked for `/go`, and `/upload` reports how much of a body has arrived so far while
that body is still being sent. A proxy that buffers makes these tests hang and fail.

    GET  /hello            a fixed text
    ANY  /echo             method, path, headers and body of the request, as JSON
    GET  /bytes?n=N        N bytes of a known pattern, with a length
    GET  /sse              event "one", then (after /go) event "two", then the end
    GET  /go               lets /sse go on
    POST /upload           reads the body; answers its size and SHA-256
    GET  /upload-state     bytes that /upload has read so far
    GET  /ws               WebSocket: echoes text and binary messages, answers pings
"""

import base64
import hashlib
import json
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3

go = threading.Event()
received = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body_chunks(self):
        """The request's body piece by piece, with a length or chunked."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                while size:
                    piece = self.rfile.read1(min(size, 65536))
                    size -= len(piece)
                    yield piece
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(left, 65536))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def send_chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def do_ANY(self):
        global received
        url = urlsplit(self.path)
        if url.path == "/hello":
            self.answer(b"hello from the sandbox\n")
        elif url.path == "/echo":
            body = b"".join(self.body_chunks())
            seen = {
                "method": self.command,
                "path": self.path,
                "headers": {k.lower(): v for k, v in self.headers.items()},
                "body": base64.b64encode(body).decode(),
            }
            self.answer(json.dumps(seen).encode(), kind="application/json")
        elif url.path == "/bytes":
            n = int(parse_qs(url.query)["n"][0])
            pattern = bytes(range(256)) * 256
            self.answer((pattern * (n // len(pattern) + 1))[:n], kind="application/octet-stream")
        elif url.path == "/status":
            self.answer(b"as asked\n", status=int(parse_qs(url.query)["code"][0]))
        elif url.path == "/sse":
            go.clear()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.send_chunk(b"data: one\n\n")
            self.send_chunk(b"data: two\n\n" if go.wait(60) else b"data: nobody asked for /go\n\n")
            self.send_chunk(b"")
        elif url.path == "/go":
            go.set()
            self.answer(b"going\n")
        elif url.path == "/upload":
            received = 0
            digest = hashlib.sha256()
            for piece in self.body_chunks():
                digest.update(piece)
                received += len(piece)
            total = {"size": received, "sha256": digest.hexdigest()}
            self.answer(json.dumps(total).encode(), kind="application/json")
        elif url.path == "/upload-state":
            self.answer(str(received).encode())
        elif url.path == "/ws":
            self.websocket()
        else:
            self.answer(b"no such page\n", status=404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_ANY

    def websocket(self):
        key = self.headers.get("Sec-WebSocket-Key")
        if self.headers.get("Upgrade", "").lower() != "websocket" or not key:
            self.answer(b"a WebSocket handshake is needed\n", status=426)
            return
        accept = base64.b64encode(hashlib.sha1((key + WEBSOCKET_GUID).encode()).digest())
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept.decode())
        self.end_headers()
        self.close_connection = True
        message = b""
        kind = 0
        while True:
            head = self.rfile.read(2)
            if len(head) < 2:
                return
            final, opcode, length = head[0] & 0x80, head[0] & 0x0F, head[1] & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.rfile.read(8))
            mask = self.rfile.read(4)
            data = self.rfile.read(length)
            pad = (mask * (length // 4 + 1))[:length]
            data = (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(length, "big")
            if opcode == 8:
                self.frame(8, data)
                return
            if opcode == 9:
                self.frame(10, data)
                continue
            if opcode == 10:
                continue
            kind = opcode or kind
            message += data
            if final:
                self.frame(kind, message)
                message = b""

    def frame(self, opcode, data):
        size = len(data)
        if size < 126:
            head = struct.pack(">BB", 0x80 | opcode, size)
        elif size < 65536:
            head = struct.pack(">BBH", 0x80 | opcode, 126, size)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 127, size)
        self.wfile.write(head + data)
        self.wfile.flush()


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
    print("listening", flush=True)
    server.serve_forever()
