#!/usr/bin/env python3
"""The ingress proxy beside nginx as a plain reverse proxy to the same backend, in one run.

    cargo build --release -p nidus-proxy --example ingress
    python3 scripts/bench_ingress.py [--json]

Needs root (installs nginx-light and wrk from Debian where they are missing). Both proxies have two workers and keep
connections to the backend, which is another nginx: a small answer, and a file of 100 MiB. Rounds alternate; the best
of each is told, since what disturbs a machine only makes it slower. Afterwards 2,000 WebSockets stand idle through ours.
"""

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
OURS = Path(os.environ.get("NIDUS_INGRESS", REPO / "target/x86_64-unknown-linux-gnu/release/examples/ingress"))
BACKEND, NGINX, NIDUS, WEBSOCKET, SINK = 18080, 18081, 18082, 18083, 18084
ROUNDS, SECONDS, BIG = 3, 6, 100 << 20
HEADERS = ["-H", "E2b-Sandbox-Id: bench", "-H", f"E2b-Sandbox-Port: {BACKEND}"]


def configuration(folder: Path, port: int, server: str, http: str = "") -> str:
    return f"""
daemon off; worker_processes 2; pid {folder}/{port}.pid; error_log {folder}/{port}.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000; client_max_body_size 0;
  client_body_temp_path {folder}/{port}-body; proxy_temp_path {folder}/{port}-proxy;
  {http}
  server {{ listen 127.0.0.1:{port} backlog=4096; {server} }}
}}
"""


def start_nginx(folder: Path, port: int, *more: str) -> subprocess.Popen:
    path = folder / f"{port}.conf"
    path.write_text(configuration(folder, port, *more))
    return subprocess.Popen(["nginx", "-c", str(path), "-e", f"{folder}/{port}.log"])


def wait_port(port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"nobody listens on port {port}")


def wrk(port: int, connections: int) -> dict:
    out = subprocess.run(
        ["wrk", "-t2", f"-c{connections}", f"-d{SECONDS}s", "--latency", *HEADERS, f"http://127.0.0.1:{port}/small"],
        capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        sys.exit(f"wrk had errors:\n{out}")
    unit = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    value, name = re.search(r"99%\s+([\d.]+)(us|ms|s)", out).groups()
    return {"requests_per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), "p99_ms": float(value) * unit[name]}


def curl(*args: str) -> float:
    """MiB/s of one body of 100 MiB."""
    out = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code} %{time_total}", "-H", "E2b-Sandbox-Id: bench", *args],
        capture_output=True, text=True, check=True).stdout.split()
    if out[0] not in ("200", "201", "204"):
        sys.exit(f"curl {args} answered {out[0]}")
    return (BIG >> 20) / float(out[1])


def memory(pid: int, what: str = "VmRSS") -> int:
    """KiB."""
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def websockets(count: int, ours: subprocess.Popen) -> dict:
    """Opens them through ours to a server of this process, and looks at the proxy's memory."""
    server = socket.create_server(("127.0.0.1", WEBSOCKET), backlog=4096)
    before, ends = memory(ours.pid), []
    accept = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", NIDUS))
        client.sendall(
            f"GET /ws HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: bench\r\nE2b-Sandbox-Port: {WEBSOCKET}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        guest, _ = server.accept()
        while b"\r\n\r\n" not in guest.recv(65536):
            pass
        guest.sendall(accept)
        assert client.recv(65536).startswith(b"HTTP/1.1 101")
        ends.append((client, guest))
    idle = memory(ours.pid)
    # They live: a frame there and back on each.
    frame = struct.pack(">BB", 0x82, 4) + b"ping"
    for client, guest in ends:
        client.sendall(frame)
        assert guest.recv(100) == frame
        guest.sendall(frame)
        assert client.recv(100) == frame
    used = memory(ours.pid)
    for pair in ends:
        for end in pair:
            end.close()
    server.close()
    return {"count": count, "idle_kib_each": (idle - before) / count, "after_use_kib_each": (used - before) / count}


def main() -> None:
    missing = [p for p, program in (("nginx-light", "nginx"), ("wrk", "wrk"), ("curl", "curl")) if not shutil.which(program)]
    if missing:
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], check=True, stdout=subprocess.DEVNULL)
    if not OURS.is_file():
        sys.exit(f"{OURS} is not there: cargo build --release -p nidus-proxy --example ingress")
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
    folder = Path(tempfile.mkdtemp(prefix="nidus-bench-"))
    folder.chmod(0o755)
    (folder / "big").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    backend = f"root {folder}; location = /small {{ return 200 'hello from the backend\\n'; }}"
    upstream = f"upstream backend {{ server 127.0.0.1:{BACKEND}; keepalive 128; }} upstream sink {{ server 127.0.0.1:{SINK}; }}"
    up = "location /put { proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection ''; " \
         "proxy_request_buffering off; } "
    plain = "location / { proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ''; " \
            "proxy_max_temp_file_size 0; proxy_request_buffering off; }"
    running = []
    try:
        running.append(start_nginx(folder, BACKEND, backend))
        running.append(start_nginx(folder, NGINX, up + plain, upstream))
        running.append(ours := subprocess.Popen([str(OURS), "proxy", f"127.0.0.1:{NIDUS}", "127.0.0.1"]))
        running.append(subprocess.Popen([str(OURS), "sink", f"127.0.0.1:{SINK}"]))
        for port in (BACKEND, NGINX, NIDUS, SINK):
            wait_port(port)
        best = {"nginx": {}, "nidus": {}}

        def keep(who: str, name: str, value: float) -> None:
            lower = name.startswith("p99")
            old = best[who].get(name)
            best[who][name] = value if old is None else (min if lower else max)(old, value)

        for _ in range(ROUNDS):
            for who, port in (("nginx", NGINX), ("nidus", NIDUS)):
                for connections in (2, 64):
                    for name, value in wrk(port, connections).items():
                        keep(who, f"{name}, {connections} connections", value)
                keep(who, "MiB/s, 100 MiB down", curl("-H", f"E2b-Sandbox-Port: {BACKEND}", f"http://127.0.0.1:{port}/big"))
                keep(who, "MiB/s, 100 MiB up", curl("-H", f"E2b-Sandbox-Port: {SINK}", "-H", "Expect:", "-T", str(folder / "big"),
                                                      f"http://127.0.0.1:{port}/put"))
        best["websockets"] = websockets(2000, ours)
        best["nidus_peak_kib"] = memory(ours.pid, "VmHWM")
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()
        shutil.rmtree(folder)
    if "--json" in sys.argv:
        print(json.dumps(best, indent=2))
        return
    print(f"{'':<34}{'nginx':>10}{'nidus':>10}{'ratio':>8}")
    for name, theirs in best["nginx"].items():
        mine = best["nidus"][name]
        print(f"{name:<34}{theirs:>10.2f}{mine:>10.2f}{mine / theirs:>8.2f}")
    w = best["websockets"]
    print(f"{w['count']} idle WebSockets: {w['idle_kib_each']:.1f} KiB each, {w['after_use_kib_each']:.1f} KiB after a frame each way; "
          f"at its most the proxy had {best['nidus_peak_kib'] / 1024:.0f} MiB")


main()
