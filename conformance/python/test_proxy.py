"""A server inside the sandbox, reached through the proxy in every way that clients use."""

import asyncio
import base64
import hashlib
import json
import os
import subprocess

import httpx
import pytest
from conftest import SUPPORT
from support.daemon import wait_for
from websockets.sync.client import connect as ws_connect

PORT = 8000


@pytest.fixture(scope="module")
def served(sbx):
    """The sandbox, with support/guest_server.py listening in it."""
    sbx.files.write("/home/user/server.py", (SUPPORT / "guest_server.py").read_text())
    handle = sbx.commands.run(f"python3 -u /home/user/server.py {PORT}", background=True, timeout=0)
    for out, _, _ in handle:
        if out and "listening" in out:
            break
    return sbx


@pytest.fixture(params=["headers", "host"])
def address(request, served):
    """The two ways to say which sandbox and port: E2B's headers, or the host name."""
    if request.param == "headers":
        return {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": str(PORT)}
    return {"Host": served.get_host(PORT)}


@pytest.fixture
def client(sandbox_url, address):
    with httpx.Client(base_url=sandbox_url, headers=address, timeout=60) as client:
        yield client


@pytest.fixture
def h2_client(sandbox_url, served):
    """HTTP/2 with prior knowledge on the plain port."""
    headers = {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": str(PORT)}
    with httpx.Client(base_url=sandbox_url, headers=headers, timeout=60, http1=False, http2=True) as client:
        yield client


def test_get_host_names_the_port_and_the_sandbox(served):
    assert served.get_host(PORT).startswith(f"{PORT}-{served.sandbox_id}.")


def test_get(client):
    answer = client.get("/hello")
    assert (answer.status_code, answer.text) == (200, "hello from the sandbox\n")


def test_the_request_arrives_as_sent(client):
    answer = client.post("/echo?a=b%20c&d=%2F%25&e", content=b"\x00body\xff", headers={"X-Own": "value", "Cookie": "a=1; b=2"})
    seen = answer.json()
    assert (seen["method"], seen["path"]) == ("POST", "/echo?a=b%20c&d=%2F%25&e")
    assert base64.b64decode(seen["body"]) == b"\x00body\xff"
    assert seen["headers"]["x-own"] == "value"
    assert seen["headers"]["cookie"] == "a=1; b=2"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods(client, method):
    assert client.request(method, "/echo").json()["method"] == method


def test_head_has_no_body(client):
    answer = client.head("/bytes?n=1000")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "1000")


@pytest.mark.parametrize("code", [204, 302, 404, 418, 500, 503])
def test_statuses_are_the_servers_own(client, code):
    assert client.get(f"/status?code={code}").status_code == code


def test_five_megabytes_down(client):
    answer = client.get("/bytes?n=5000000")
    pattern = bytes(range(256)) * 256
    assert answer.content == (pattern * 77)[:5_000_000]


def test_five_megabytes_up(client):
    body = os.urandom(5_000_000)
    total = client.post("/upload", content=body).json()
    assert total == {"size": 5_000_000, "sha256": hashlib.sha256(body).hexdigest()}


def test_an_answer_streams_as_it_is_made(client):
    """The second event is sent only after /go, which we ask for once the first has arrived."""
    check_sse(client)


def test_a_body_streams_as_it_is_sent(client):
    check_upload(client)


def check_sse(client):
    with client.stream("GET", "/sse") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        pieces = answer.iter_text()
        text = ""
        while "one" not in text:
            text += next(pieces)
        assert "two" not in text
        client.get("/go")
        text += "".join(pieces)
    assert text == "data: one\n\ndata: two\n\n"


def check_upload(client):
    """The sender goes on only when the server inside has read what was sent so far."""

    def body():
        yield b"a" * 1000
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60) as other:
            wait_for("the first piece to arrive in the sandbox", lambda: other.get("/upload-state").text == "1000", 30)
        yield b"b" * 1000

    total = client.post("/upload", content=body()).json()
    assert total["size"] == 2000


def test_h2c_get_and_post(h2_client):
    answer = h2_client.get("/hello")
    assert (answer.http_version, answer.status_code, answer.text) == ("HTTP/2", 200, "hello from the sandbox\n")
    seen = h2_client.post("/echo", content=b"over h2", headers={"X-Own": "v"}).json()
    assert base64.b64decode(seen["body"]) == b"over h2" and seen["headers"]["x-own"] == "v"
    assert len(h2_client.get("/bytes?n=3000000").content) == 3_000_000


def test_h2c_streams_both_ways(h2_client):
    check_sse(h2_client)
    check_upload(h2_client)


async def test_h2c_many_requests_on_one_connection(served, sandbox_url):
    """Asynchronous, as httpx's HTTP/2 over several threads sends its frames out of order now and then."""
    headers = {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": str(PORT)}
    async with httpx.AsyncClient(base_url=sandbox_url, headers=headers, timeout=60, http1=False, http2=True) as client:
        first = await client.get("/hello")
        answers = await asyncio.gather(*(client.get(f"/bytes?n={n}") for n in range(1000, 1012)))
        connections = {a.extensions["network_stream"].get_extra_info("client_addr") for a in (first, *answers)}
    assert [len(answer.content) for answer in answers] == list(range(1000, 1012))
    assert len(connections) == 1, connections


def test_curl_by_host_over_h1_and_h2(served, sandbox_url):
    """As a user would with curl; over HTTP/2 the host name is the :authority."""
    host = served.get_host(PORT)
    for option in ("--http1.1", "--http2-prior-knowledge"):
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "30", option, "-H", f"Host: {host}", f"{sandbox_url}/hello"],
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.returncode) == ("hello from the sandbox\n", 0), (option, done.stderr)


@pytest.mark.parametrize("way", ["headers", "host"])
def test_websocket(served, sandbox_url, way):
    url = sandbox_url.replace("http://", "ws://") + "/ws"
    if way == "headers":
        options = {"additional_headers": {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": str(PORT)}}
    else:
        host, port = sandbox_url.removeprefix("http://").split(":")
        url = f"ws://{served.get_host(PORT)}/ws"
        options = {"address": (host, int(port))}
    with ws_connect(url, max_size=None, compression=None, **options) as ws:
        ws.send("žluť")
        assert ws.recv(timeout=30) == "žluť"
        ws.send(b"\x00\xff" * 100_000)
        assert ws.recv(timeout=30) == b"\x00\xff" * 100_000
        assert ws.ping().wait(30)
        for n in range(20):
            ws.send(str(n))
        assert [ws.recv(timeout=30) for _ in range(20)] == [str(n) for n in range(20)]


def test_a_closed_port_says_so(served, sandbox_url):
    headers = {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": "8123"}
    answer = httpx.get(f"{sandbox_url}/", headers=headers, timeout=60)
    assert answer.status_code == 502
    body = answer.json()
    assert "port is not open" in body["message"] and body["code"] == 502
    assert served.is_running()


def test_an_unknown_sandbox_says_so(sandbox_url):
    headers = {"E2b-Sandbox-Id": "inosuchsandbox000000", "E2b-Sandbox-Port": str(PORT)}
    answer = httpx.get(f"{sandbox_url}/", headers=headers, timeout=60)
    assert answer.status_code == 502
    assert "was not found" in answer.json()["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "example.com"},
        {"Host": "notaport-abc.e2b.app"},
        {"Host": "99999-abc.e2b.app"},
        {"E2b-Sandbox-Id": "abc", "E2b-Sandbox-Port": "http"},
        {"E2b-Sandbox-Id": "../../etc", "E2b-Sandbox-Port": "80"},
    ],
    ids=lambda h: json.dumps(h),
)
def test_addresses_that_name_nothing_are_refused_cleanly(sandbox_url, headers):
    answer = httpx.get(f"{sandbox_url}/", headers=headers, timeout=60)
    assert 400 <= answer.status_code <= 502 and answer.status_code != 500
    assert answer.text.strip()


def test_envd_asks_for_its_token(served, sandbox_url):
    """Files and processes are closed to whoever has no access token, and /init to everybody."""
    headers = {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": "49983"}
    with httpx.Client(base_url=sandbox_url, headers=headers, timeout=60) as client:
        assert client.get("/health").status_code == 204
        assert client.get("/files", params={"path": "/etc/hostname", "username": "user"}).status_code == 401
        assert client.post("/process.Process/List", json={}).status_code == 401
        assert client.get("/files", params={"path": "/etc/hostname"}, headers={"X-Access-Token": "wrong"}).status_code == 401
        token = {"X-Access-Token": served.connection_config.sandbox_headers["X-Access-Token"]}
        assert client.post("/process.Process/List", json={}, headers=token).status_code == 200
        assert client.post("/init", json={"envVars": {"X": "1"}}, headers=token).status_code in (401, 403, 404)


def test_signed_urls(served, folder, sandbox_url):
    """download_url and upload_url carry a signature in place of the token."""
    served.files.write(f"{folder}/a b%.txt", "signed content")
    route = {"E2b-Sandbox-Id": served.sandbox_id, "E2b-Sandbox-Port": "49983"}
    url = served.download_url(f"{folder}/a b%.txt", use_signature_expiration=60)
    assert httpx.get(url, headers=route).text == "signed content"
    assert httpx.get(url.replace("signature=v1_", "signature=v1_A"), headers=route).status_code == 401
    old = served.download_url(f"{folder}/a b%.txt", use_signature_expiration=-60)
    assert httpx.get(old, headers=route).status_code == 401
    upload = served.upload_url(f"{folder}/up.txt")
    assert httpx.post(upload, headers=route, files={"file": ("up.txt", b"uploaded")}).status_code == 200
    assert served.files.read(f"{folder}/up.txt") == "uploaded"
    assert httpx.get(upload, headers=route).status_code == 401, "a signature to write does not read"


def test_requests_one_after_another_reuse_a_connection(client):
    for _ in range(20):
        assert client.get("/hello").status_code == 200
