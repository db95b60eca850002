#!/usr/bin/python3
"""Stands in envd's place, inside a sandbox, and answers as no envd would: the mode is in /root/mode."""

import socket
import threading

MODE = open("/root/mode").read().strip()


def answer(connection):
    try:
        if MODE == "silent":
            while connection.recv(65536):
                pass
            return
        connection.recv(65536)
        if MODE == "garbage":
            connection.sendall(bytes(range(256)) * 40)
            return
        if MODE == "endless-headers":
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            n = 0
            while True:
                connection.sendall(b"".join(b"X-%d: %s\r\n" % (n + i, b"a" * 1000) for i in range(100)))
                n += 100
        if MODE == "endless-body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        if MODE == "long-promise":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999999999999999\r\n\r\n{")
            while connection.recv(65536):
                pass
        if MODE == "wrong-json":
            body = b'{"ts": -9e99, "cpu_count": "many", "mem_total": [1]}'
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    except OSError:
        pass
    finally:
        connection.close()


listener = socket.create_server(("", 49983), backlog=64)
while True:
    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
