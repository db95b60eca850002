"""MCP servers in a sandbox: `Sandbox.create(mcp={...})` and `add_mcp_server`, on the template of templates/mcp-gateway."""

import json
import os
import shutil
import subprocess
import sys
import uuid

import e2b
import httpx
import pytest
from e2b import CommandExitException, Sandbox, SandboxException, Template
from support import definitions, gateway
from support.daemon import wait_for

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("NIDUS_TESTBED") == "1", reason="no packages to make the template of in the test bed's machine"),
]

SERVER = definitions.REPO / "conformance" / "support" / "guest_mcp.py"
CLIENT = """
import asyncio, json, sys
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

async def main(url, headers):
    async with httpx2.AsyncClient(headers=json.loads(headers), timeout=60) as http:
        async with Client(streamable_http_client(url, http_client=http)) as client:
            names = [t.name for t in (await client.list_tools()).tools]
            said = await client.call_tool("get_current_time", {"timezone": "Europe/Berlin"})
            print(json.dumps([names, said.content[0].text]))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """One with a server from PyPI and a repository of GitHub's, both of which it has at hand."""
    gateway.template()
    context = tmp_path_factory.mktemp("mcp")
    shutil.copytree(gateway.packages() / "wheels", context / "wheels")
    (context / "server.py").write_text(SERVER.read_text())
    name = f"mcp-{uuid.uuid4().hex[:8]}"
    built = (
        Template(file_context_path=str(context)).from_template("mcp-gateway").set_user("root")
        .copy("wheels", "/opt/wheels").copy("server.py", "/srv/tools/server.py")
        .run_cmd("cd /srv/tools && git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm x")
        .run_cmd("git config --system url.file:///srv/.insteadOf https://github.com/me/ && git config --system safe.directory '*'")
        .set_envs({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/opt/wheels"})
        .add_mcp_server("time")
        .run_cmd("rm -r /opt/wheels").set_user("user")
    )
    Template.build(built, name, cpu_count=1, memory_mb=512)
    yield name
    httpx.delete(f"{os.environ['E2B_API_URL']}/templates/{name}", headers={"X-API-Key": os.environ["E2B_API_KEY"]})


def github(name):
    """The settings of our server, installed as if from GitHub."""
    return {"runCmd": "python3 server.py", "installCmd": "echo $KEY > /tmp/installed", "envs": {"SERVER_NAME": name, "KEY": f"key-{name}"}}


class Gateway:
    """The gateway of a sandbox, as it is reached from outside."""

    def __init__(self, sandbox):
        assert sandbox.get_mcp_url().endswith("/mcp") and "50005" in sandbox.get_mcp_url()
        self.url = f"{os.environ['E2B_SANDBOX_URL']}/mcp"
        self.headers = {
            "E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "50005", "Accept": "application/json, text/event-stream",
            "Authorization": f"Bearer {sandbox.get_mcp_token()}",
        }

    def post(self, body, **options):
        return httpx.post(self.url, json=body, headers=self.headers | options.pop("headers", {}), **options)

    def call(self, method, **params):
        answer = self.post({"jsonrpc": "2.0", "id": 5, "method": method, "params": params}).json()
        assert answer["id"] == 5
        return answer.get("result", answer.get("error"))

    def tool(self, name, **arguments):
        answer = self.call("tools/call", name=name, arguments=arguments)
        return answer["content"][0]["text"] if "content" in answer else answer


@pytest.fixture(scope="module")
def box(template):
    with Sandbox.create(template, timeout=600, mcp={"time": {}, "github/me/tools": github("one")}) as sandbox:
        yield sandbox


@pytest.fixture
def mcp(box):
    return Gateway(box)


def test_the_official_client_uses_a_server_of_the_catalogue(mcp):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(gateway.packages() / "client"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, mcp.url, json.dumps(mcp.headers)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names, said = json.loads(done.stdout)
    assert {"get_current_time", "convert_time", "who", "only-one"} <= set(names)
    assert json.loads(said)["timezone"] == "Europe/Berlin"


def test_servers_from_github_are_installed_and_run_as_the_user(box, mcp):
    assert mcp.tool("who", x=1) == "one as user 1000 with key-one of {'x': 1}"
    assert box.commands.run("cat /tmp/installed").stdout == "key-one\n"
    assert len(mcp.tool("only-one")) == 1 << 20
    assert mcp.call("resources/read", uri="test://one")["contents"][0]["text"] == "one has test://one"
    assert mcp.call("prompts/get", name="hello")["messages"][0]["content"]["text"] == "one"
    assert "one" in str(mcp.call("resources/list")) and "hello" in str(mcp.call("prompts/list"))


def test_what_servers_tell_of_their_progress_arrives(mcp):
    body = {"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {
        "name": "slow", "arguments": {"steps": 3}, "_meta": {"progressToken": "mine"}}}
    with httpx.stream("POST", mcp.url, json=body, headers=mcp.headers, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [e["params"]["progress"] for e in events[:-1]] == [1, 2, 3]
    assert {e["params"]["progressToken"] for e in events[:-1]} == {"mine"}
    assert events[-1]["id"] == 9 and events[-1]["result"]["content"][0]["text"] == "done"


def test_a_client_that_goes_away_cancels_its_call(box, mcp):
    with pytest.raises(httpx.TimeoutException):
        mcp.post({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "slow", "arguments": {"steps": 600}}}, timeout=1)
    wait_for("the server to be told", lambda: box.files.exists("/tmp/one-cancelled"), 30)


def test_a_server_that_ends_is_started_again(mcp):
    died = mcp.tool("die")
    assert died["code"] == -32000 and "exit code 7" in died["message"]
    assert mcp.tool("who").startswith("one as user")
    assert mcp.call("tools/call", name="fail")["message"] == "one does not know tools/call"
    unknown = mcp.call("tools/call", name="nothing")
    assert unknown["code"] == -32602 and "nothing" in unknown["message"]


def test_the_token_is_needed(mcp):
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    for wrong in ({"Authorization": "Bearer x"}, {"Authorization": ""}, {"Authorization": mcp.headers["Authorization"] + "x"}):
        assert mcp.post(ping, headers=wrong).status_code == 401
    assert mcp.post(ping).json() == {"jsonrpc": "2.0", "id": 1, "result": {}}


def test_messages_that_are_none(mcp):
    for bad in ([], "x", [1], 5):
        assert mcp.post(bad).status_code == 400
    assert httpx.post(mcp.url, content=b"{", headers=mcp.headers).status_code == 400
    assert mcp.post({"jsonrpc": "2.0", "method": "notifications/initialized"}).status_code == 202
    assert httpx.get(mcp.url, headers=mcp.headers).status_code == 405
    assert mcp.call("no/such")["code"] == -32601
    both = mcp.post([{"jsonrpc": "2.0", "id": n, "method": "ping"} for n in (1, 2)]).json()
    assert [a["id"] for a in both] == [1, 2]
    for asked, said in (("2025-03-26", "2025-03-26"), ("1999-01-01", "2025-06-18")):
        assert mcp.call("initialize", protocolVersion=asked, capabilities={}, clientInfo={})["protocolVersion"] == said


def test_it_goes_on_after_a_pause(template):
    sandbox = Sandbox.create(template, timeout=600, mcp={"github/me/tools": github("two")})
    try:
        mcp = Gateway(sandbox)
        assert mcp.tool("who").startswith("two as user")
        sandbox.pause()
        sandbox.connect(timeout=600)
        assert mcp.tool("who").startswith("two as user")
        # Another who knows the sandbox finds the token in it.
        again = Sandbox.connect(sandbox.sandbox_id)
        assert again.get_mcp_token() == sandbox.get_mcp_token()
    finally:
        sandbox.kill()


def test_two_servers_with_tools_of_one_name(template):
    more = "cp -r /srv/tools /srv/more"
    sandbox = Sandbox.create(template, timeout=600)
    try:
        sandbox.commands.run(more, user="root")
        config = json.dumps({"github/me/tools": github("one"), "github/me/more": github("two")})
        said = sandbox.commands.run(f"mcp-gateway --config '{config}'", user="root", envs={"GATEWAY_ACCESS_TOKEN": "t"}, timeout=300)
        assert "2 servers answer" in said.stdout
        mcp = Gateway(sandbox)
        names = [t["name"] for t in mcp.call("tools/list")["tools"]]
        assert "who" in names and "github-me-more-who" in names
        assert mcp.tool("who").startswith("one") and mcp.tool("github-me-more-who").startswith("two")
        # A second configuration takes the place of the first.
        config = json.dumps({"github/me/more": github("three")})
        sandbox.commands.run(f"mcp-gateway --config '{config}'", user="root", timeout=300)
        assert Gateway(sandbox).tool("who").startswith("three")
    finally:
        sandbox.kill()


def test_what_cannot_be_started_is_said(template):
    with Sandbox.create(template, timeout=300) as sandbox:
        for config, why in (
            ("{", "not JSON"), ("[]", "not an object"), ({"no-such-server": {}}, "there is no server 'no-such-server'"),
            ({"time": 1}, "settings of time"), ({"github/me/tools": {}}, "has no runCmd"),
            ({"github/me/nothing": {"runCmd": "x"}}, "get github/me/nothing"), ({"filesystem": {"paths": []}}, "no npm"),
            ({"github/me/tools": {"runCmd": "x", "installCmd": "exit 3"}}, "exit code 3"),
            ({"github/me/tools": {"runCmd": "false"}}, "exit code 1"), ({"../etc": {}}, "there is no server"),
        ):
            text = config if isinstance(config, str) else json.dumps(config)
            with pytest.raises(CommandExitException) as said:
                sandbox.commands.run(f"mcp-gateway --config '{text}'", user="root", timeout=300)
            assert why in said.value.stderr and "Traceback" not in said.value.stderr, said.value.stderr
    # By the SDK, the sandbox is gone then.
    with pytest.raises(SandboxException, match="has no runCmd"):
        Sandbox.create(template, timeout=120, mcp={"github/me/tools": {}}, metadata={"mcp": template})
    assert Sandbox.list(query=e2b.SandboxQuery(metadata={"mcp": template})).next_items() == []


async def test_the_async_sdk(template):
    sandbox = await e2b.AsyncSandbox.create(template, timeout=300, mcp={"github/me/tools": github("one")})
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "50005", "Authorization": f"Bearer {await sandbox.get_mcp_token()}"}
    assert sandbox.get_mcp_url().endswith("/mcp")
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{os.environ['E2B_SANDBOX_URL']}/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, headers=headers)
    assert "only-one" in answer.text
    await sandbox.kill()


def test_without_a_template_it_is_the_gateways(template):
    with Sandbox.create(timeout=120, mcp={}) as sandbox:
        assert Gateway(sandbox).call("tools/list") == {"tools": []}
