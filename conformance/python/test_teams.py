"""Teams: keys, access tokens, limits, and what the admin token is for."""

import concurrent.futures

import pytest
from e2b import RateLimitException, Sandbox
from support.checks import assert_error_body
from support.daemon import wait_for
from support.teams import admin, new_team, nidus


@pytest.fixture(scope="module")
def team():
    return new_team()


def test_keys_over_rest(team):
    with team.manager() as manager:
        made = manager.post("/api-keys", json={"name": "ci"})
        assert made.status_code == 201
        made = made.json()
        key, mask = made["key"], made["mask"]
        assert key.startswith(mask["prefix"] + mask["maskedValuePrefix"]) and key.endswith(mask["maskedValueSuffix"])
        assert mask["valueLength"] == len(key) - len(mask["prefix"]) == 40
        listed = {k["id"]: k for k in manager.get("/api-keys").json()}
        assert listed[made["id"]]["name"] == "ci" and listed[made["id"]]["lastUsed"] is None
        assert key not in str(listed)
        assert Sandbox.list(api_key=key).next_items() == []
        assert {k["id"]: k for k in manager.get("/api-keys").json()}[made["id"]]["lastUsed"]
        assert manager.patch(f"/api-keys/{made['id']}", json={"name": "ci2"}).status_code == 200
        assert "ci2" in manager.get("/api-keys").text
        assert manager.delete(f"/api-keys/{made['id']}").status_code == 204
        assert manager.delete(f"/api-keys/{made['id']}").status_code == 404
    with new_team().manager() as other:
        assert made["id"] not in other.get("/api-keys").text


def test_access_tokens_over_rest(team):
    with team.manager() as manager:
        made = manager.post("/access-tokens", json={"name": "laptop"}).json()
        assert made["token"].startswith("sk_e2b_")
        manager.headers["Authorization"] = f"Bearer {made['token']}"
        teams = manager.get("/teams").json()
        assert [t["teamID"] for t in teams] == [team.id]
        assert manager.get("/v2/sandboxes").json() == []
        assert manager.delete(f"/access-tokens/{made['id']}").status_code == 204
        assert manager.get("/teams").status_code == 401


def test_a_key_does_not_manage_keys(team):
    with team.client() as client:
        for method, path in (("GET", "/api-keys"), ("POST", "/api-keys"), ("POST", "/access-tokens")):
            assert_error_body(client.request(method, path, json={"name": "x"}), 401)


def test_a_team_runs_as_many_sandboxes_as_it_may():
    limited = new_team(max_sandboxes=2)
    made = [Sandbox.create(timeout=120, api_key=limited.key) for _ in range(2)]
    try:
        with pytest.raises(RateLimitException, match="maximum number of concurrent"):
            Sandbox.create(timeout=60, api_key=limited.key)
        with limited.client() as client:
            answer = client.post("/sandboxes", json={"templateID": "base"})
            assert answer.status_code == 429 and answer.headers["Should-Retry"] == "false", "waiting does not help"
        # What is paused runs not, and cannot come back while its place is taken.
        made[0].pause(api_key=limited.key)
        made.append(Sandbox.create(timeout=120, api_key=limited.key))
        with pytest.raises(RateLimitException):
            Sandbox.connect(made[0].sandbox_id, api_key=limited.key)
        made.pop().kill(api_key=limited.key)
        Sandbox.connect(made[0].sandbox_id, api_key=limited.key, timeout=120)
    finally:
        for sandbox in made:
            Sandbox.kill(sandbox.sandbox_id, api_key=limited.key)


def test_of_many_at_once_not_one_too_many_comes_in():
    limited = new_team(max_sandboxes=2)

    def create(_):
        with limited.client() as client:
            return client.post("/sandboxes", json={"templateID": "base", "timeout": 60}).status_code

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        statuses = sorted(pool.map(create, range(6)))
    with limited.client() as client:
        running = client.get("/v2/sandboxes").json()
        for sandbox in running:
            client.delete(f"/sandboxes/{sandbox['sandboxID']}")
    assert set(statuses) <= {201, 429} and len(running) == statuses.count(201) <= 2


def test_a_blocked_team_is_told_why_and_let_in_again():
    shut = new_team()
    nidus("team", "block", shut.id, "--reason", "unpaid bill")
    with shut.client() as client, shut.manager() as manager:
        for c, path in ((client, "/v2/sandboxes"), (client, "/templates"), (manager, "/api-keys")):
            assert "unpaid bill" in assert_error_body(c.get(path), 403)
        assert "unpaid bill" in assert_error_body(client.post("/sandboxes", json={"templateID": "base"}), 403)
        nidus("team", "unblock", shut.id)
        assert client.get("/v2/sandboxes").status_code == 200


def test_too_many_requests_are_429_and_told_when_to_come_again():
    hasty = new_team()

    def ask(_):
        with hasty.client() as client:
            return [client.get("/teams") for _ in range(120)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [a for some in pool.map(ask, range(8)) for a in some]
    refused = [a for a in answers if a.status_code != 200]
    if refused:
        assert {a.status_code for a in refused} == {429} and all((a.headers["Retry-After"], a.headers["Should-Retry"]) == ("1", "true") for a in refused)
    with hasty.client() as client:
        wait_for("the team to be let in again", lambda: client.get("/teams").status_code == 200, 10)


def test_the_admin_token_sees_nodes_and_counts(team):
    with admin() as client:
        nodes = client.get("/nodes").json()
        assert len(nodes) == 1
        node = nodes[0]
        assert node["status"] == "ready" and node["metrics"]["cpuCount"] > 0 and node["machineInfo"]["cpuArchitecture"]
        assert client.get(f"/nodes/{node['id']}").json()["id"] == node["id"]
        assert_error_body(client.get("/nodes/nowhere"), 404)
        assert_error_body(client.post(f"/nodes/{node['id']}", json={"status": "asleep"}), 400)
        before = node["createSuccesses"]
        sandboxes = [Sandbox.create(timeout=120, api_key=team.key) for _ in range(2)]
        assert client.get(f"/nodes/{node['id']}").json()["createSuccesses"] >= before + 2
        assert client.get("/admin/sandboxes/running-counts").json()[team.id] == 2
        killed = client.post(f"/admin/teams/{team.id}/sandboxes/kill").json()
        assert killed == {"killedCount": 2, "failedCount": 0}
        assert team.id not in client.get("/admin/sandboxes/running-counts").json()
        assert not any(s.is_running() for s in sandboxes)
        assert client.post(f"/admin/teams/{team.id}/builds/cancel").json() == {"cancelledCount": 0, "failedCount": 0}
        made = client.post(f"/admin/teams/{team.id}/api-keys", json={"name": "by-admin"}).json()
        assert Sandbox.list(api_key=made["key"]).next_items() == []
        assert client.delete(f"/admin/teams/{team.id}/api-keys/{made['id']}").status_code == 204
        for path in ("sandboxes/kill", "builds/cancel"):
            assert_error_body(client.post(f"/admin/teams/00000000-0000-0000-0000-000000000000/{path}"), 404)
        # As the team itself.
        client.headers["X-Team-ID"] = team.id
        assert client.get("/v2/sandboxes").json() == []
        assert any(k["name"] == "key" for k in client.get("/api-keys").json())


@pytest.mark.parametrize("token", ["", "x", "0" * 32])
def test_a_wrong_admin_token_opens_nothing(team, token):
    with admin() as client:
        client.headers["X-Admin-Token"] = token
        for method, path in (
            ("GET", "/nodes"),
            ("GET", "/admin/sandboxes/running-counts"),
            ("POST", f"/admin/teams/{team.id}/sandboxes/kill"),
            ("POST", f"/admin/teams/{team.id}/api-keys"),
        ):
            assert_error_body(client.request(method, path, json={"name": "x"}), 401)
