"""Runs *inside* a sandbox: long-lived flows, each of which says something every 50 ms and wants its answer.

Reads lines of JSON: {"name": N, "ip": A, "port": P} opens a TCP flow to an echo server, with {"sni": S} one of TLS with a
request after the other. Says `N open`, then `N COUNT` at every tenth answer, and `N cut WHY` when it is over.
"""

import json
import socket
import ssl
import sys
import threading
import time

lock = threading.Lock()


def say(text):
    with lock:
        print(text, flush=True)


def flow(name, ip, port, sni=None):
    try:
        s = socket.create_connection((ip, port), timeout=10)
        if sni:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            s = context.wrap_socket(s, server_hostname=sni)
        stream = s.makefile("rb")
        say(f"{name} open")
        count = 0
        while True:
            if sni:
                s.sendall(f"GET /{count} HTTP/1.1\r\nHost: {sni}\r\n\r\n".encode())
                if not stream.readline().startswith(b"HTTP/1.1 200"):
                    raise ConnectionError("another answer")
                length = 0
                while (line := stream.readline()).strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                stream.read(length)
            else:
                s.sendall(f"{count}\n".encode())
                if stream.readline() != f"{count}\n".encode():
                    raise ConnectionError("another answer")
            count += 1
            if count % 10 == 0:
                say(f"{name} {count}")
            time.sleep(0.05)
    except OSError as e:
        say(f"{name} cut {type(e).__name__} {e}")


say("ready")
for line in sys.stdin:
    threading.Thread(target=flow, kwargs=json.loads(line), daemon=True).start()
