"""The REST interface itself, as curl or another client meets it: statuses, bodies and bad input."""

import re

import httpx
import pytest
from support.checks import assert_error_body

ISO_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")


@pytest.fixture(scope="module")
def sandbox_id(sbx):
    return sbx.sandbox_id


def test_health_needs_no_key(api):
    answer = httpx.get(f"{api.base_url}/health")
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("path", ["/sandboxes", "/v2/sandboxes"])
def test_create_answers_201_with_what_an_sdk_needs(api, path):
    answer = api.post(path, json={"templateID": "base", "timeout": 30, "metadata": {"k": "v"}, "unknownField": 1})
    assert answer.status_code == 201, answer.text
    body = answer.json()
    try:
        for field in ("templateID", "sandboxID", "clientID", "envdVersion", "envdAccessToken"):
            assert isinstance(body[field], str) and body[field], field
        assert re.fullmatch(r"\d+\.\d+\.\d+", body["envdVersion"])
        assert re.fullmatch(r"[a-z0-9]+", body["sandboxID"]), "it becomes a host name"
        assert body["alias"] == "base"
    finally:
        killed = api.delete(f"/sandboxes/{body['sandboxID']}")
    assert (killed.status_code, killed.content) == (204, b"")


def test_detail_and_lists(api, sandbox_id):
    detail = api.get(f"/sandboxes/{sandbox_id}").json()
    assert detail["sandboxID"] == sandbox_id and detail["state"] == "running"
    for field in ("templateID", "clientID", "startedAt", "endAt", "envdVersion", "cpuCount", "memoryMB", "diskSizeMB"):
        assert field in detail, field
    for field in ("startedAt", "endAt"):
        assert ISO_TIME.match(detail[field]), detail[field]
    for path in ("/sandboxes", "/v2/sandboxes?limit=100"):
        listed = api.get(path)
        assert listed.status_code == 200
        mine = [item for item in listed.json() if item["sandboxID"] == sandbox_id]
        assert len(mine) == 1
        assert "envdAccessToken" not in mine[0], "lists carry no secrets"
        assert mine[0]["metadata"] == {"suite": "python"}


def test_timeout_and_refresh(api, sandbox_id):
    answer = api.post(f"/sandboxes/{sandbox_id}/timeout", json={"timeout": 200})
    assert (answer.status_code, answer.content) == (204, b"")
    assert api.post(f"/sandboxes/{sandbox_id}/refreshes", json={"duration": 220}).status_code == 204


def test_connect_paths(api, sandbox_id):
    for path in (f"/sandboxes/{sandbox_id}/connect", f"/v2/sandboxes/{sandbox_id}/connect"):
        answer = api.post(path, json={"timeout": 200})
        assert answer.status_code == 200, answer.text
        assert answer.json()["sandboxID"] == sandbox_id
        assert answer.json()["envdAccessToken"]


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "e2b_" + "0" * 40}, {"X-API-Key": "x"}, {"X-API-Key": ""}], ids=["none", "unknown", "short", "empty"])
def test_without_a_good_key_everything_is_401(api, sandbox_id, headers):
    with httpx.Client(base_url=api.base_url, headers=headers) as client:
        for method, path in (
            ("GET", "/sandboxes"),
            ("GET", "/v2/sandboxes"),
            ("POST", "/sandboxes"),
            ("POST", "/v2/sandboxes"),
            ("GET", f"/sandboxes/{sandbox_id}"),
            ("DELETE", f"/sandboxes/{sandbox_id}"),
            ("POST", f"/sandboxes/{sandbox_id}/timeout"),
            ("POST", f"/sandboxes/{sandbox_id}/connect"),
        ):
            assert_error_body(client.request(method, path), 401)
    assert api.get(f"/sandboxes/{sandbox_id}").status_code == 200, "it is still there"


def test_an_unknown_template_is_404_and_named(api):
    message = assert_error_body(api.post("/sandboxes", json={"templateID": "no-such-template"}), 404)
    assert "no-such-template" in message


@pytest.mark.parametrize("path", ["/sandboxes", "/v2/sandboxes"])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"timeout": 5}',
        b'{"templateID": 5}',
        b'{"templateID": "base", "timeout": "soon"}',
        b'{"templateID": "base", "timeout": -1}',
        b'{"templateID": "base", "metadata": {"a": 1}}',
        b'{"templateID": "base", "envVars": ["a"]}',
    ],
    ids=repr,
)
def test_broken_bodies_are_400(api, path, body):
    answer = api.post(path, content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 201:
        api.delete(f"/sandboxes/{answer.json()['sandboxID']}")
    assert_error_body(answer, 400)


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"timeout": -5}', b'{"timeout": "x"}'], ids=repr)
def test_broken_timeouts_are_400(api, sandbox_id, body):
    answer = api.post(f"/sandboxes/{sandbox_id}/timeout", content=body, headers={"Content-Type": "application/json"})
    assert_error_body(answer, 400)
    assert api.get(f"/sandboxes/{sandbox_id}").status_code == 200


@pytest.mark.parametrize("query", ["limit=-1", "limit=many", "nextToken=%00broken", "state=flying", "startedAfter=yesterday"])
def test_broken_queries_are_400(api, query):
    assert_error_body(api.get(f"/v2/sandboxes?{query}"), 400)


def test_paths_that_are_nothing(api):
    assert_error_body(api.get("/no/such/path"), 404)
    for odd in ("%2e%2e%2f%2e%2e", "x" * 300, "%00", "a%20b"):
        answer = api.get(f"/sandboxes/{odd}")
        assert answer.status_code in (400, 404), odd
        assert answer.json()["code"] == answer.status_code


def test_a_huge_body_is_refused_and_the_server_lives(api):
    answer = api.post("/sandboxes", content=b'{"templateID": "' + b"x" * (8 << 20) + b'"}', headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404, 413)
    assert httpx.get(f"{api.base_url}/health").status_code == 204


def test_http2_with_prior_knowledge(api):
    with httpx.Client(base_url=api.base_url, http1=False, http2=True) as client:
        answer = client.get("/health")
        assert (answer.http_version, answer.status_code) == ("HTTP/2", 204)
