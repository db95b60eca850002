"""envd's Connect protocol by hand: JSON and binary, unary and streaming, HTTP/1.1 and h2c.

The SDKs speak JSON only; other clients (Connect's generated Go and web ones) speak the binary codec.
Messages are encoded here field by field, so that nothing but the contract's numbers is trusted.
"""

import base64
import json
import struct

import httpx
import pytest


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    """One length-delimited (str, bytes) or varint (int) protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def fields(raw):
    """{number: [values]} of a protobuf message."""
    found, at = {}, 0

    def number():
        nonlocal at
        n = shift = 0
        while True:
            byte = raw[at]
            at += 1
            n |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return n

    while at < len(raw):
        tag = number()
        if tag & 7 == 0:
            value = number()
        else:
            assert tag & 7 == 2, f"wire type {tag & 7}"
            size = number()
            value = raw[at : at + size]
            at += size
        found.setdefault(tag >> 3, []).append(value)
    return found


def enveloped(message):
    """Connect's streaming frame: flags, length, message."""
    return struct.pack(">BI", 0, len(message)) + message


def envelopes(raw):
    """(flags, message) of every frame; the last has flag 2 and is JSON."""
    found, at = [], 0
    while at < len(raw):
        flags, size = struct.unpack_from(">BI", raw, at)
        found.append((flags, raw[at + 5 : at + 5 + size]))
        at += 5 + size
    return found


@pytest.fixture(params=["http1", "h2c"])
def envd(request, sbx, sandbox_url):
    headers = {
        "E2b-Sandbox-Id": sbx.sandbox_id,
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": sbx.connection_config.sandbox_headers["X-Access-Token"],
        "Connect-Protocol-Version": "1",
        "Authorization": "Basic " + base64.b64encode(b"user:").decode(),
    }
    h2 = request.param == "h2c"
    with httpx.Client(base_url=sandbox_url, headers=headers, http1=not h2, http2=h2, timeout=60) as client:
        yield client


def post(client, path, body, kind):
    return client.post(path, content=body, headers={"Content-Type": f"application/{kind}"})


def test_unary_json(envd):
    answer = post(envd, "/filesystem.Filesystem/Stat", b'{"path": "/etc"}', "json")
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "application/json")
    entry = answer.json()["entry"]
    assert (entry["name"], entry["type"], entry["path"]) == ("etc", "FILE_TYPE_DIRECTORY", "/etc")
    assert isinstance(entry["size"], str), "protobuf's JSON writes an int64 as a string"


def test_unary_binary(envd):
    answer = post(envd, "/filesystem.Filesystem/Stat", field(1, "/etc"), "proto")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/proto")
    entry = fields(fields(answer.content)[1][0])
    assert (entry[1], entry[2], entry[3]) == ([b"etc"], [2], [b"/etc"])


def test_unary_errors(envd):
    for kind, body in (("json", b'{"path": "/no/such"}'), ("proto", field(1, "/no/such"))):
        answer = post(envd, "/filesystem.Filesystem/Stat", body, kind)
        assert answer.status_code == 404
        assert answer.headers["content-type"].split(";")[0] == "application/json", "Connect's errors are JSON in every codec"
        assert answer.json()["code"] == "not_found" and "/no/such" in answer.json()["message"]


def test_what_is_no_request(envd):
    assert post(envd, "/filesystem.Filesystem/Stat", b"{", "json").status_code == 400
    assert post(envd, "/filesystem.Filesystem/Stat", b"\xff\xff\xff", "proto").status_code == 400
    assert post(envd, "/filesystem.Filesystem/NoSuchCall", b"{}", "json").status_code == 404
    assert post(envd, "/filesystem.Filesystem/Stat", b"{}", "xml").status_code == 415


def test_streaming_json(envd):
    start = {"process": {"cmd": "/bin/sh", "args": ["-c", "echo out; echo err >&2; exit 3"], "envs": {}}}
    answer = post(envd, "/process.Process/Start", enveloped(json.dumps(start).encode()), "connect+json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/connect+json")
    frames = envelopes(answer.content)
    assert [flags for flags, _ in frames] == [0] * (len(frames) - 1) + [2]
    events = [json.loads(message)["event"] for _, message in frames[:-1]]
    assert events[0]["start"]["pid"] > 0
    data = [event["data"] for event in events if "data" in event]
    assert b"".join(base64.b64decode(d["stdout"]) for d in data if "stdout" in d) == b"out\n"
    assert b"".join(base64.b64decode(d["stderr"]) for d in data if "stderr" in d) == b"err\n"
    assert (events[-1]["end"]["exitCode"], events[-1]["end"]["exited"]) == (3, True)
    assert "error" not in json.loads(frames[-1][1])


def test_streaming_binary(envd):
    process = field(1, "/bin/sh") + field(2, "-c") + field(2, 'printf "$A"; exit 3') + field(3, field(1, "A") + field(2, "ž"))
    answer = post(envd, "/process.Process/Start", enveloped(field(1, process)), "connect+proto")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/connect+proto")
    frames = envelopes(answer.content)
    assert frames[-1][0] == 2 and "error" not in json.loads(frames[-1][1])
    events = [fields(fields(message)[1][0]) for _, message in frames[:-1]]
    assert fields(events[0][1][0])[1][0] > 0, "a start event with the pid comes first"
    out = b"".join(fields(event[2][0]).get(1, [b""])[0] for event in events if 2 in event)
    assert out == "ž".encode()
    end = fields(events[-1][3][0])
    assert (end[1], end[2]) == ([6], [1]), "exit code 3 as a zig-zag sint32, and exited"


def test_streaming_errors_come_in_the_last_frame(envd):
    start = {"process": {"cmd": "/bin/sh", "cwd": "/no/such/folder"}}
    answer = post(envd, "/process.Process/Start", enveloped(json.dumps(start).encode()), "connect+json")
    assert answer.status_code == 200
    flags, message = envelopes(answer.content)[-1]
    assert flags == 2 and json.loads(message)["error"]["code"] == "invalid_argument"


def test_client_streaming_binary(envd, sbx):
    handle = sbx.commands.run("cat", background=True, stdin=True)
    selector = field(1, handle.pid)
    body = enveloped(field(1, field(1, selector)))
    for piece in (b"one ", b"two ", b"three"):
        body += enveloped(field(2, field(2, field(1, piece))))
    answer = post(envd, "/process.Process/StreamInput", body, "connect+proto")
    assert answer.status_code == 200
    assert "error" not in json.loads(envelopes(answer.content)[-1][1])
    sbx.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "one two three"


def test_a_tag_selects_a_process(envd, sbx):
    start = {"process": {"cmd": "/bin/sleep", "args": ["600"]}, "tag": "my-tag"}
    with envd.stream("POST", "/process.Process/Start", content=enveloped(json.dumps(start).encode()), headers={"Content-Type": "application/connect+json"}) as answer:
        frames = answer.iter_raw()
        next(frames)
        assert [p.tag for p in sbx.commands.list() if p.tag] == ["my-tag"]
        killed = post(envd, "/process.Process/SendSignal", json.dumps({"process": {"tag": "my-tag"}, "signal": "SIGNAL_SIGKILL"}).encode(), "json")
        assert killed.status_code == 200
        assert b"signal: killed" in b"".join(frames)
    again = post(envd, "/process.Process/SendSignal", b'{"process": {"tag": "my-tag"}, "signal": "SIGNAL_SIGKILL"}', "json")
    assert again.status_code == 404
