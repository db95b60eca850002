"""A policy that changes while the sandbox runs: at once for what it forbids, and nothing else is disturbed."""

import json
import threading
import time

import pytest
from support import sandboxes
from support.daemon import REPO, wait_for
from support.testnet import EVIL, GOOD, PUBLIC_RESOLVER, attempt, prepare

SUPPORT = REPO / "conformance/support"
ALL = "0.0.0.0/0"


class Flows:
    """Flows of a guest, as it tells of them."""

    def __init__(self, sandbox):
        self.sandbox, self.said, self.changed = sandbox, [], threading.Condition()
        sandbox.files.write("/root/flows.py", (SUPPORT / "guest_flows.py").read_text(), user="root")
        self.command = sandbox.commands.run(
            "python3 -u /root/flows.py", user="root", background=True, stdin=True, timeout=0)
        threading.Thread(target=self.listen, daemon=True).start()
        self.wait(lambda line: line == "ready")

    def listen(self):
        try:
            for out, _, _ in self.command:
                with self.changed:
                    now = time.monotonic()
                    self.said += [(now, line) for line in (out or "").splitlines()]
                    self.changed.notify_all()
        except Exception:  # the sandbox is gone, and with it whoever waits
            pass

    def wait(self, condition, since=0.0, seconds=20):
        """The first line since then that it is true of, and when it came."""
        found = []

        def there():
            found[:] = [(at, line) for at, line in self.said if at >= since and condition(line)]
            return bool(found)

        with self.changed:
            assert self.changed.wait_for(there, seconds), f"waited in vain; the guest said {self.said[-30:]}"
        return found[0]

    def open(self, name, ip, port=7, **more):
        at = time.monotonic()
        asked = json.dumps({"name": name, "ip": ip, "port": port, **more})
        self.sandbox.commands.send_stdin(self.command.pid, asked + "\n")
        assert self.wait(lambda line: line.startswith(f"{name} "), at)[1] == f"{name} open"

    def goes_on(self, name, since):
        """Twice ten more answers came."""
        first, _ = self.wait(lambda line: line.startswith(f"{name} "), since)
        _, line = self.wait(lambda line: line.startswith(f"{name} "), first + 0.001)
        assert "cut" not in line, line

    def is_cut(self, name, since):
        at, _ = self.wait(lambda line: line.startswith(f"{name} cut"), since)
        return at - since


@pytest.fixture
def sandbox(net_daemon):
    sandbox = sandboxes.create(net_daemon)
    prepare(sandbox)
    yield sandbox
    sandbox.kill(**sandboxes.options(net_daemon))


@pytest.fixture
def update(sandbox, net_daemon):
    """Puts a policy in force; answers when that was asked for."""

    def put(**network):
        began = time.monotonic()
        sandbox.update_network(network, **sandboxes.options(net_daemon))
        print(f"    {network}: in force after {1000 * (time.monotonic() - began):.0f} ms")
        return began

    return put


def test_allowed_flows_live_on_and_others_are_cut(sandbox, update):
    flows = Flows(sandbox)
    flows.open("good", GOOD)
    flows.open("evil", EVIL)
    # By address, in the kernel.
    at = update(deny_out=[EVIL])
    print(f"    a denied flow was cut after {1000 * flows.is_cut('evil', at):.0f} ms")
    flows.goes_on("good", time.monotonic())
    assert attempt(sandbox, "tcp", EVIL, 7, wait=2) in ("reset", "none")
    # To names: what stands to their addresses goes on, what is new goes by its name.
    update(allow_out=["good.test", "*.wild.test"], deny_out=[ALL])
    flows.goes_on("good", time.monotonic())
    assert attempt(sandbox, "tcp", GOOD, 7) in ("reset", "closed")
    flows.open("tls-good", GOOD, 443, sni="good.test")
    flows.open("tls-wild", GOOD, 443, sni="a.wild.test")
    # One name less: flows that the gateway carries.
    at = update(allow_out=["good.test"], deny_out=[ALL])
    print(f"    a flow to a name that is denied now was cut after {1000 * flows.is_cut('tls-wild', at):.0f} ms")
    flows.goes_on("tls-good", time.monotonic())
    flows.goes_on("good", time.monotonic())
    assert attempt(sandbox, "https", GOOD, "a.wild.test") in ("reset", "closed")
    assert attempt(sandbox, "dns", PUBLIC_RESOLVER, "a.wild.test") == "REFUSED"
    # Nothing.
    at = update(deny_out=[ALL])
    cut = [flows.is_cut(name, at) for name in ("good", "tls-good")]
    print(f"    the last ones were cut after {1000 * max(cut):.0f} ms")
    assert attempt(sandbox, "tcp", GOOD, 7, wait=2) in ("reset", "none")
    # Everything.
    update()
    assert attempt(sandbox, "tcp", EVIL, 7) == "ok"


def test_headers_are_set_from_the_next_request_on(sandbox, update, net):
    def secrets(since):
        return [e["headers"].get("x-secret") for e in net.since(since) if e["what"] == "http"]

    rule = {"good.test": [{"transform": {"headers": {"X-Secret": "one"}}}]}
    before = net.mark()
    update(rules=rule)
    assert attempt(sandbox, "https", GOOD, "good.test", verify=True) == "ok I am good"
    assert secrets(before) == ["one"]
    before = net.mark()
    rule["good.test"][0]["transform"]["headers"]["X-Secret"] = "two"
    update(rules=rule)
    assert attempt(sandbox, "http", GOOD, "good.test", "good.test") == "ok I am good / ok I am good"
    assert secrets(before) == ["two", "two"]
    before = net.mark()
    update()
    assert attempt(sandbox, "http", GOOD, "good.test") == "ok I am good"
    assert secrets(before) == [None]


def test_a_policy_that_is_wrong_changes_nothing(sandbox, update, net_daemon):
    update(deny_out=[EVIL])
    for network, word in (
        ({"denyOut": ["10.0.0.0/33"]}, "10.0.0.0/33"),
        ({"allowOut": ["good.test"]}, "ALL_TRAFFIC"),
        ({"egressProxy": {"address": "10.0.0.1:1080"}}, "no sandbox reaches"),
        ({"egressProxy": {"address": "nowhere.test:1080"}}, "nowhere.test"),
    ):
        status, answer = net_daemon.rest("PUT", f"/sandboxes/{sandbox.sandbox_id}/network", network)
        assert status == 400 and word in answer["message"], (network, status, answer)
    assert attempt(sandbox, "tcp", EVIL, 7, wait=2) in ("reset", "none")
    assert attempt(sandbox, "tcp", GOOD, 7) == "ok"


def test_a_policy_outlives_a_pause(sandbox, update, net_daemon):
    from e2b import Sandbox

    mine = sandboxes.options(net_daemon)
    update(allow_out=["good.test"], deny_out=[ALL])
    sandbox.pause(**mine)
    again = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
    wait_for("the resumed sandbox to answer", lambda: again.is_running(), 20)
    assert attempt(again, "https", EVIL, "good.test") == "ok I am good"
    assert attempt(again, "tcp", EVIL, 7) in ("reset", "closed", "none")
    assert attempt(again, "dns", PUBLIC_RESOLVER, "evil.test") == "REFUSED"
    _, shown = net_daemon.rest("GET", f"/sandboxes/{sandbox.sandbox_id}")
    assert shown["network"]["allowOut"] == ["good.test"] and shown["network"]["denyOut"] == [ALL], shown
