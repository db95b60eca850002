"""Logs and figures of sandboxes, by the SDK and by REST."""

import json
from datetime import datetime, timedelta, timezone

import pytest
from e2b import AsyncSandbox, NotFoundException, Sandbox
from support.daemon import wait_for

LOGS = "http://192.0.2.1/logs"


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox.create(timeout=600)
    yield sandbox
    sandbox.kill()


def figures(sandbox, **options):
    return wait_for("figures of a sandbox", lambda: sandbox.get_metrics(**options), 60)


def test_figures_by_the_sdk(sandbox):
    before = datetime.now(timezone.utc) - timedelta(minutes=5)
    first = figures(sandbox)[0]
    info = sandbox.get_info()
    assert first.cpu_count == info.cpu_count and 0 <= first.cpu_used_pct <= 100
    assert 0 < first.mem_used < first.mem_total <= info.memory_mb << 20 and first.mem_cache > 0
    assert 0 < first.disk_used < first.disk_total
    assert Sandbox.get_metrics(sandbox.sandbox_id)[0] == first
    assert before < first.timestamp <= datetime.now(timezone.utc) + timedelta(seconds=1)
    more = wait_for("a second look", lambda: len(all := sandbox.get_metrics()) > 1 and all, 60)
    assert [m.timestamp for m in more] == sorted(m.timestamp for m in more)
    later = sandbox.get_metrics(start=first.timestamp + timedelta(seconds=1))
    assert later and all(m.timestamp > first.timestamp for m in later)
    assert first in sandbox.get_metrics(end=first.timestamp + timedelta(seconds=1))
    assert sandbox.get_metrics(start=before - timedelta(days=2), end=before - timedelta(days=1)) == []


async def test_figures_by_the_async_sdk(sandbox):
    figures(sandbox)
    same = await AsyncSandbox.connect(sandbox.sandbox_id, timeout=600)
    assert (await same.get_metrics())[0].mem_total > 0


def test_figures_follow_what_the_guest_does(sandbox):
    before = figures(sandbox)[-1]
    sandbox.commands.run("head -c 30M /dev/urandom > /home/user/thirty && sync")
    grown = wait_for("the file in the figures", lambda: [m for m in sandbox.get_metrics() if m.disk_used > before.disk_used + (25 << 20)], 60)
    assert grown[0].timestamp > before.timestamp


def test_figures_of_many(api, sandbox):
    figures(sandbox)
    for query in (f"sandbox_ids={sandbox.sandbox_id},inobody", f"sandbox_ids=inobody&sandbox_ids={sandbox.sandbox_id}"):
        found = api.get(f"/sandboxes/metrics?{query}").json()["sandboxes"]
        assert list(found) == [sandbox.sandbox_id] and found[sandbox.sandbox_id]["memTotal"] > 0
    assert api.get("/sandboxes/metrics").status_code == 400
    assert api.get("/sandboxes/metrics?sandbox_ids=" + ",".join(["x"] * 101)).status_code == 400


def test_figures_of_the_team(api, sandbox):
    team = api.get("/teams").json()[0]["teamID"]
    seen = wait_for("the team's figures", lambda: [m for m in api.get(f"/teams/{team}/metrics").json() if m["concurrentSandboxes"]], 60)
    assert set(seen[0]) == {"timestamp", "timestampUnix", "concurrentSandboxes", "sandboxStartRate"}
    most = api.get(f"/teams/{team}/metrics/max?metric=concurrent_sandboxes").json()
    assert most["value"] >= max(m["concurrentSandboxes"] for m in seen)
    assert api.get(f"/teams/{team}/metrics/max?metric=sandbox_start_rate").json()["value"] > 0
    assert api.get(f"/teams/{team}/metrics?start=1&end=2").json() == []
    assert api.get(f"/teams/{team}/metrics/max?metric=concurrent_sandboxes&start=1&end=2").json()["value"] == 0
    for path, status in ((f"{team}/metrics?start=2&end=1", 400), (f"{team}/metrics/max", 400), (f"{team}/metrics/max?metric=x", 400),
                         ("00000000-0000-0000-0000-000000000000/metrics", 403)):
        assert api.get(f"/teams/{path}").status_code == status, path


def say(sandbox, **entry):
    done = sandbox.commands.run(f"curl -s -o /dev/null -w '%{{http_code}}' -m 20 -d '{json.dumps(entry)}' {LOGS}")
    assert done.stdout == "200", done.stdout


def test_logs(api):
    sandbox = Sandbox.create(timeout=600)
    path = f"/sandboxes/{sandbox.sandbox_id}/logs"
    say(sandbox, message="first words", level="warn", logger="app", n=3)
    say(sandbox, message="Second", level="debug")
    v1 = api.get(path).json()
    assert [e["message"] for e in v1["logEntries"]] == ["Sandbox created", "first words", "Second"]
    lines = [json.loads(e["line"]) for e in v1["logs"]]
    assert [(e["level"], e["logger"]) for e in lines] == [("info", "orchestrator"), ("warn", "app"), ("debug", "guest")]
    assert v1["logEntries"][1]["fields"] == {"logger": "app", "n": "3"}
    at = [int(datetime.fromisoformat(e["timestamp"]).timestamp() * 1000) for e in v1["logEntries"]]

    def messages(query):
        return [e["message"] for e in api.get(f"/v2{path}?{query}").json()["logs"]]

    assert messages("") == ["Sandbox created", "first words", "Second"]
    assert messages("direction=backward&limit=2") == ["Second", "first words"]
    assert messages(f"direction=backward&cursor={at[1]}") == ["first words", "Sandbox created"]
    assert messages(f"cursor={at[1]}") == ["first words", "Second"]
    assert messages("level=info") == ["Sandbox created", "first words"]
    assert messages("search=SECOND") == ["Second"]
    assert [e["message"] for e in api.get(f"{path}?start={at[2]}&limit=5").json()["logEntries"]] == ["Second"]
    for query in ("direction=up", "level=loud", "cursor=x", "limit=-1"):
        assert api.get(f"/v2{path}?{query}").status_code == 400, query
    # They are there after its end, as its figures are.
    figures(sandbox)
    sandbox.kill()
    assert messages("limit=10")[-1].startswith("Sandbox killed")
    assert Sandbox.get_metrics(sandbox.sandbox_id)


def test_of_nobody_there_is_nothing(api):
    for path in ("sandboxes/inobody/logs", "v2/sandboxes/inobody/logs", "sandboxes/inobody/metrics",
                 "sandboxes/..%2Fmetrics/logs", "sandboxes/..%2f..%2fhealth/metrics", "sandboxes/a%3Fb/metrics"):
        assert api.get(f"/{path}").status_code == 404, path
    with pytest.raises(NotFoundException):
        Sandbox.get_metrics("inobody")


def test_a_guest_that_never_answers_has_no_figures_and_costs_others_none(api):
    silent, other = Sandbox.create(timeout=600), Sandbox.create(timeout=600)
    try:
        figures(silent)
        # Its own envd is at its root's mercy: it stands still, and answers nobody.
        last = silent.get_metrics()[-1].timestamp
        silent.commands.run("(sleep 1; pkill -STOP -x envd) > /dev/null 2>&1 &", user="root")
        wait_for("figures of the other one", lambda: [m for m in other.get_metrics() if m.timestamp > last + timedelta(seconds=15)], 90)
        assert all(m.timestamp < last + timedelta(seconds=15) for m in silent.get_metrics())
        assert api.get(f"/sandboxes/{silent.sandbox_id}").status_code == 200
    finally:
        silent.kill()
        other.kill()
