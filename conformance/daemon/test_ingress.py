"""The sandbox proxy's other doors: TLS by a certificate, TLS to the guest, gRPC, and times."""

import json
import subprocess

import grpc
import httpx
import pytest
from support import sandboxes
from support.daemon import Daemon, free_ports
from support.testnet import run as execute

GUEST_TLS = """
import http.server, ssl, subprocess, sys
subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
    "-keyout", "/tmp/k.pem", "-out", "/tmp/c.pem", "-days", "1", "-subj", "/CN=whoever"], check=True, capture_output=True)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"tls in the guest, host {self.headers['Host']}, proto {self.headers['X-Forwarded-Proto']}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("0.0.0.0", 8443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain("/tmp/c.pem", "/tmp/k.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
print("listening", flush=True)
server.serve_forever()
"""

STALLS = """
import socket, threading
def serve(s):
    s.recv(65536); s.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 100\\r\\n\\r\\nfirst"); s.recv(1)
server = socket.create_server(("0.0.0.0", 8000))
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    chain, key = folder / "chain.pem", folder / "key.pem"
    execute("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key),
            "-out", str(chain), "-days", "2", "-subj", "/CN=sandboxes", "-addext", "subjectAltName=DNS:*.sandbox.test")
    return chain, key


@pytest.fixture(scope="module")
def node(certificate, tmp_path_factory):
    """A daemon whose proxy speaks TLS, and the port for that."""
    (port,) = free_ports(1)
    extra = {
        "NIDUS_PROXY_TLS_ADDR": f"127.0.0.1:{port}", "NIDUS_PROXY_TLS_CERT": str(certificate[0]),
        "NIDUS_PROXY_TLS_KEY": str(certificate[1]), "NIDUS_PROXY_IDLE_TIMEOUT_S": "4",
    }
    daemon = Daemon(extra_env=extra, log_path=tmp_path_factory.mktemp("daemon") / "nidus.log").start()
    daemon.create_key()
    yield daemon, port
    assert daemon.terminate() == 0


@pytest.fixture(scope="module")
def sandbox_id(node):
    """A sandbox that serves TLS on port 8443 and stalls on 8000."""
    daemon, _ = node
    mine = sandboxes.options(daemon)
    sandbox = sandboxes.create(daemon, network={"https_ports": [8443]})
    for name, code in (("tls", GUEST_TLS), ("stalls", STALLS)):
        sandbox.files.write(f"/home/user/{name}.py", code)
    # The proxy's idle time holds for the stream of a command as for any other: this one says something all the time.
    start = """
        for name in tls stalls; do
            python3 -u $name.py > $name.log 2>&1 &
            for n in $(seq 600); do grep -q listening $name.log && break; echo .; sleep 0.2; done
            grep -q listening $name.log || { cat $name.log; exit 1; }
        done
    """
    sandbox.commands.run(start, timeout=180)
    yield sandbox.sandbox_id
    sandbox.kill(**mine)


def curl(node, certificate, host, *args):
    """By the real name, which leads to the proxy."""
    _, port = node
    done = subprocess.run(
        ["curl", "-sS", "-i", "-m", "20", "--cacert", str(certificate[0]), "--resolve", f"{host}:{port}:127.0.0.1", *args, f"https://{host}:{port}/"],
        capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_tls_on_both_sides(node, certificate, sandbox_id, version):
    host = f"8443-{sandbox_id}.sandbox.test"
    seen = curl(node, certificate, host, version)
    assert f"tls in the guest, host {host}:{node[1]}, proto https" in seen, seen
    assert seen.startswith("HTTP/2 200" if version == "--http2" else "HTTP/1.1 200"), seen


def test_a_name_that_the_certificate_has_not(node, certificate, sandbox_id):
    assert "certificate" in curl(node, certificate, f"8443-{sandbox_id}.other.test")


def test_pages_and_answers_of_the_proxy_itself(node, certificate):
    host = "8000-nosuchsandbox.sandbox.test"
    page = curl(node, certificate, host, "-H", "Accept: text/html")
    assert "text/html" in page and "<h1>The sandbox was not found</h1>" in page
    answer = curl(node, certificate, host)
    assert json.loads(answer.split("\n\n")[1])["message"] == "The sandbox was not found"


def test_an_answer_that_stalls_is_cut(node, sandbox_id):
    daemon, _ = node
    headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "8000"}
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", daemon.sandbox_url, headers=headers, timeout=30) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"first"
        list(pieces)


def test_grpc_to_a_port_where_nothing_listens(node, sandbox_id):
    """The answer is gRPC's own, made of HTTP's status; what goes through is crates/proxy/tests/ingress's."""
    daemon, _ = node
    channel = grpc.insecure_channel(daemon.sandbox_url.removeprefix("http://"))
    call = channel.unary_unary("/service/Method", request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.RpcError) as failed:
        call(b"x", metadata=[("e2b-sandbox-id", sandbox_id), ("e2b-sandbox-port", "9999")], timeout=20)
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    channel.close()
