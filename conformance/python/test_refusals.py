"""Requests that must not get what they ask for: wrong, expired, another team's, and paths that lead elsewhere.

Each row is a request and the one answer that it may get. `support.tables` makes docs/refusals.md of what was
tried and what came.
"""

import json
import os
import time
import uuid
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox, Secret, Template, Volume
from support.daemon import TIME_FACTOR
from support.teams import new_team

REPORTS = os.environ.get("NIDUS_REPORT_DIR")
tried: list[dict] = []

# What an outsider may try with another team's things, by the call that is tried.
CROSS_TEAM = [
    ("GET", "/sandboxes/{sandbox}", None),
    ("DELETE", "/sandboxes/{sandbox}", None),
    ("POST", "/sandboxes/{sandbox}/timeout", {"timeout": 1}),
    ("POST", "/sandboxes/{sandbox}/refreshes", {"duration": 1}),
    ("POST", "/sandboxes/{sandbox}/pause", None),
    ("POST", "/sandboxes/{sandbox}/resume", {}),
    ("POST", "/sandboxes/{sandbox}/connect", {"timeout": 60}),
    ("POST", "/v2/sandboxes/{sandbox}/connect", {}),
    ("POST", "/sandboxes/{sandbox}/snapshots", {}),
    ("POST", "/sandboxes/{sandbox}/fork", {}),
    ("PUT", "/sandboxes/{sandbox}/network", {}),
    ("GET", "/sandboxes/{sandbox}/metrics", None),
    ("GET", "/sandboxes/{sandbox}/logs", None),
    ("GET", "/v2/sandboxes/{sandbox}/logs", None),
    ("GET", "/sandboxes/{paused}", None),
    ("POST", "/sandboxes/{paused}/resume", {}),
    ("POST", "/sandboxes/{paused}/connect", {"timeout": 60}),
    ("DELETE", "/sandboxes/{paused}", None),
    ("POST", "/sandboxes", {"templateID": "{template}"}),
    ("POST", "/v2/sandboxes", {"templateID": "{snapshot}"}),
    ("GET", "/templates/{template}", None),
    ("PATCH", "/v2/templates/{template}", {"public": True}),
    ("DELETE", "/templates/{template}", None),
    ("GET", "/templates/{template}/tags", None),
    ("GET", "/templates/{template}/tags/groups", None),
    ("GET", "/templates/{template}/tags/default/assignments", None),
    ("GET", "/templates/aliases/{template}", None),
    ("GET", "/templates/{template}/files/{hash}", None),
    ("GET", "/templates/{template}/builds/{build}/status", None),
    ("GET", "/templates/{template}/builds/{build}/logs", None),
    ("POST", "/v2/templates/{template}/builds/{build}", {"fromTemplate": "base"}),
    ("POST", "/templates/tags", {"target": "{template}", "tags": ["x"]}),
    ("DELETE", "/templates/tags", {"name": "{template}", "tags": ["x"]}),
    ("GET", "/secrets/{secret}", None),
    ("POST", "/secrets/{secret}", {"value": "v"}),
    ("DELETE", "/secrets/{secret}", None),
    ("GET", "/volumes/{volume}", None),
    ("DELETE", "/volumes/{volume}", None),
]

# Ids that are paths: they lead nowhere, not to another route and not to a file.
PATHS = ["..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e", "..%5c..", "a%00b", "%2fetc%2fpasswd", "x" * 2000, "%ff%fe", "a%0d%0aX-Injected:%201"]
ID_ROUTES = [
    ("GET", "/sandboxes/{id}"), ("DELETE", "/sandboxes/{id}"), ("POST", "/sandboxes/{id}/pause"),
    ("GET", "/sandboxes/{id}/logs"), ("GET", "/sandboxes/{id}/metrics"), ("GET", "/templates/{id}"),
    ("DELETE", "/templates/{id}"), ("GET", "/templates/aliases/{id}"), ("GET", "/secrets/{id}"),
    ("DELETE", "/secrets/{id}"), ("GET", "/volumes/{id}"), ("DELETE", "/volumes/{id}"),
    ("GET", "/templates/base/files/{id}"), ("GET", "/teams/{id}/metrics"),
]


@pytest.fixture(scope="module")
def things():
    """One of everything, of the team that all other tests are of."""
    name = f"mine-{uuid.uuid4().hex[:8]}"
    sandbox, paused = Sandbox.create(timeout=int(600 * TIME_FACTOR)), Sandbox.create(timeout=int(600 * TIME_FACTOR))
    paused.pause()
    snapshot = sandbox.create_snapshot()
    built = Template.build(Template().from_template("base").run_cmd("true"), name, cpu_count=1, memory_mb=512)
    secret, volume = Secret.create(name, "v"), Volume.create(name)
    yield {
        "sandbox": sandbox.sandbox_id, "paused": paused.sandbox_id, "snapshot": snapshot.snapshot_id,
        "template": name, "build": built.build_id, "hash": "a" * 64, "secret": secret.secret_id, "volume": volume.volume_id,
        "object": sandbox,
    }
    Secret.destroy(name)
    Volume.destroy(volume.volume_id)
    Sandbox.delete_snapshot(snapshot.snapshot_id)
    for s in (sandbox, paused):
        s.kill()
    httpx.delete(f"{os.environ['E2B_API_URL']}/templates/{name}", headers={"X-API-Key": os.environ["E2B_API_KEY"]})


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    if REPORTS:
        Path(REPORTS).mkdir(parents=True, exist_ok=True)
        (Path(REPORTS) / "refusals.json").write_text(json.dumps(tried))


def note(who: str, what: str, answer) -> None:
    message = answer.text
    if answer.headers.get("content-type", "").startswith("application/json"):
        body = answer.json()
        message = body.get("message", message) if isinstance(body, dict) else message
    tried.append({"who": who, "what": what, "status": answer.status_code, "message": message[:200]})


def fill(text, things):
    return text.format(**{k: v for k, v in things.items() if isinstance(v, str)})


def fill_body(body, things):
    """The same for a body, in which no other braces are names."""
    return body and json.loads(json.dumps(body).replace("{template}", things["template"]).replace("{snapshot}", things["snapshot"]))


@pytest.mark.parametrize("method, path, body", CROSS_TEAM, ids=lambda v: str(v))
def test_another_teams_things_are_as_unknown_as_none(things, outsider, method, path, body):
    filled = fill_body(body, things)
    answer = outsider.request(method, fill(path, things), json=filled)
    note("another team", f"{method} {path} {json.dumps(body) if body else ''}".strip(), answer)
    assert answer.status_code == 404, answer.text
    nothing = things | {k: "inobodysthing" if k in ("sandbox", "paused") else str(uuid.uuid4()) for k in things if k != "object"}
    filled = fill_body(body, nothing)
    assert outsider.request(method, fill(path, nothing), json=filled).status_code == 404, "no difference to what does not exist"


@pytest.fixture(scope="module")
def outsider():
    with new_team().client() as client:
        yield client


def test_lists_show_nothing_of_another_team(things, outsider):
    for path in ("/sandboxes", "/v2/sandboxes?state=running,paused", "/snapshots", "/secrets", "/volumes"):
        answer = outsider.get(path)
        note("another team", f"GET {path}", answer)
        assert answer.json() == [], path
    assert things["template"] not in outsider.get("/templates").text
    metrics = outsider.get(f"/sandboxes/metrics?sandbox_ids={things['sandbox']}")
    assert metrics.json() == {"sandboxes": {}}
    for path in ("/teams/{team}/metrics", "/teams/{team}/metrics/max?metric=concurrent_sandboxes", "/templates?teamID={team}"):
        team = httpx.get(f"{outsider.base_url}/teams", headers={"X-API-Key": os.environ["E2B_API_KEY"]}).json()[0]["teamID"]
        answer = outsider.get(path.format(team=team))
        note("another team", f"GET {path}", answer)
        assert answer.status_code in (403, 404), answer.text


def test_what_was_tried_has_changed_nothing(things, api):
    assert things["object"].is_running()
    assert api.get(f"/sandboxes/{things['paused']}").json()["state"] == "paused"
    assert api.get(f"/templates/{things['template']}").json()["public"] is False
    assert api.get(f"/secrets/{things['secret']}").json()["currentVersion"] == 1
    assert api.get(f"/volumes/{things['volume']}").status_code == 200


@pytest.mark.parametrize("bad", PATHS, ids=lambda p: p[:24])
@pytest.mark.parametrize("method, path", ID_ROUTES)
def test_ids_that_are_paths_lead_nowhere(api, method, path, bad):
    answer = api.request(method, path.format(id=bad))
    if len(bad) < 100:
        note("the team itself", f"{method} {path.format(id=bad)}", answer)
    assert answer.status_code in (400, 403, 404, 414, 431), answer.text
    assert "root:" not in answer.text and "x-injected" not in answer.headers


def raw(things, path, **options):
    """A request to a sandbox's envd through the proxy."""
    sandbox = things["object"]
    headers = {"Host": sandbox.get_host(49983), "E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983", **options.pop("headers", {})}
    return httpx.request(options.pop("method", "GET"), os.environ["E2B_SANDBOX_URL"] + path, headers=headers, **options)


@pytest.mark.parametrize("what, headers", [
    ("no token", {}),
    ("a token of nobody", {"X-Access-Token": "0" * 64}),
    ("the API key", {"X-Access-Token": os.environ.get("E2B_API_KEY", "")}),
    ("an empty token", {"X-Access-Token": ""}),
])
@pytest.mark.parametrize("path", ["/files?path=/etc/hostname&username=user", "/metrics", "/envs"])
def test_envd_wants_its_own_token(things, what, headers, path):
    answer = raw(things, path, headers=headers)
    note(f"envd, {what}", f"GET {path}", answer)
    assert answer.status_code == 401, answer.text


def test_signed_urls_that_have_expired_or_are_another_files(things):
    sandbox = things["object"]
    sandbox.files.write("/home/user/signed", "text")
    good = httpx.URL(sandbox.download_url("/home/user/signed", use_signature_expiration=60))
    query = dict(good.params)
    assert raw(things, f"/files?{httpx.QueryParams(query)}").text == "text"
    gone = httpx.URL(sandbox.download_url("/home/user/signed", use_signature_expiration=1))
    # Whole seconds, of the guest's clock.
    while time.time() < int(gone.params["signature_expiration"]) + 2:
        time.sleep(0.1)
    for what, changed in (
        ("expired", dict(gone.params)),
        ("an end put off", query | {"signature_expiration": str(int(time.time()) + 9999)}),
        ("without its end", {k: v for k, v in query.items() if k != "signature_expiration"}),
        ("another path", query | {"path": "/etc/hostname"}),
        ("another user", query | {"username": "root"}),
        ("another signature", query | {"signature": "v1_" + "A" * 43}),
        ("an upload with it", query),
    ):
        method = "POST" if what.startswith("an upload") else "GET"
        answer = raw(things, f"/files?{httpx.QueryParams(changed)}", method=method, content=b"x" if method == "POST" else None)
        note(f"signed URL, {what}", f"{method} /files", answer)
        assert answer.status_code == 401, (what, answer.text)
    assert sandbox.files.read("/home/user/signed") == "text"


def test_keys_that_were_deleted_or_never_were():
    team = new_team()
    with team.manager() as manager:
        key = manager.post("/api-keys", json={"name": "short-lived"}).json()
        manager.delete(f"/api-keys/{key['id']}")
    for what, headers in (
        ("no key", {}),
        ("a deleted key", {"X-API-Key": key["key"]}),
        ("a key of nobody", {"X-API-Key": "e2b_" + "0" * 40}),
        ("a key with a digit changed", {"X-API-Key": team.key[:-1] + ("0" if team.key[-1] != "0" else "1")}),
        ("a key in capitals", {"X-API-Key": team.key.upper()}),
        ("an access token as key", {"X-API-Key": team.token}),
        ("no bearer", {"Authorization": team.token}),
        ("another team's id beside it", {"X-API-Key": team.key, "X-Team-ID": str(uuid.uuid4())}),
        ("SQL", {"X-API-Key": "' OR '1'='1"}),
    ):
        answer = httpx.get(f"{os.environ['E2B_API_URL']}/v2/sandboxes", headers=headers)
        note(what, "GET /v2/sandboxes", answer)
        assert answer.status_code == (403 if "X-Team-ID" in headers else 401), (what, answer.text)


@pytest.mark.parametrize("content", [
    ("path", "/../../../../etc/passwd"), ("path", "/x/../../../etc/shadow"), ("path", "/proc/self/environ"),
])
def test_volume_paths_stay_in_the_volume(things, content):
    volume = Volume.connect(things["volume"])
    for verb, resource in (("GET", "file"), ("GET", "path"), ("GET", "dir"), ("DELETE", "path")):
        answer = httpx.request(verb, f"{os.environ['E2B_VOLUME_API_URL']}/volumecontent/{volume.volume_id}/{resource}",
                               params={content[0]: content[1]}, headers={"Authorization": f"Bearer {volume.token}"})
        note("a volume's token", f"{verb} /volumecontent/ID/{resource}?path={content[1]}", answer)
        assert answer.status_code == 404, answer.text
