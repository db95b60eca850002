"""A guest whose envd was replaced by a program that answers garbage, never, or for ever: it harms itself alone."""

import os
import re
import time
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox
from support.daemon import wait_for

IMPOSTOR = (Path(__file__).resolve().parents[1] / "support/guest_envd.py").read_text()
MODES = ["garbage", "silent", "endless-headers", "endless-body", "long-promise", "wrong-json"]
# Longest time that a call about such a guest may take. The daemon's own limits are shorter.
LIMIT = 90
MIB = 1 << 20


def held(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) << 10


def ask(sandbox, path, seconds):
    """A request to the guest's envd, as a client with patience for so many seconds makes it."""
    headers = {"Host": sandbox.get_host(49983), "E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    began, size = time.monotonic(), 0
    try:
        with httpx.stream("GET", os.environ["E2B_SANDBOX_URL"] + path, headers=headers, timeout=seconds) as answer:
            for piece in answer.iter_raw():
                size += len(piece)
                if size > 8 * MIB or time.monotonic() - began > seconds:
                    return "more than was wanted"
            return answer.status_code
    except httpx.HTTPError as error:
        return type(error).__name__


@pytest.fixture
def impostor():
    made = []

    def make(mode):
        sandbox = Sandbox.create(timeout=600, metadata={"mode": mode})
        made.append(sandbox)
        sandbox.files.write("/root/mode", mode, user="root")
        sandbox.files.write("/root/impostor", IMPOSTOR, user="root")
        # The first process starts whatever is in envd's place when envd ends.
        sandbox.commands.run(
            "e=$(readlink -f /proc/$(pgrep -ox envd)/exe); chmod 755 /root/impostor; cp /root/impostor $e.new; mv $e.new $e; "
            "(sleep 0.5; pkill -9 -x envd) > /dev/null 2>&1 &", user="root")
        wait_for("the impostor", lambda: ask(sandbox, "/health", 2) != 204, 30)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_such_a_guest_harms_itself_alone(impostor, api, mode):
    daemon = int(os.environ["NIDUS_TEST_DAEMON_PID"])
    sandbox = impostor(mode)
    before = held(daemon)
    with Sandbox.create(timeout=300) as other:
        outcomes = [ask(sandbox, path, 5) for path in ("/health", "/metrics", "/files?path=/x")]
        assert 204 not in outcomes
        assert other.commands.run("echo fine").stdout == "fine\n"
        # What the host wants to know of it, and what it does with it, ends.
        began = time.monotonic()
        assert api.get(f"/sandboxes/{sandbox.sandbox_id}").json()["state"] == "running"
        assert api.get(f"/sandboxes/{sandbox.sandbox_id}/metrics").status_code == 200
        paused = api.post(f"/sandboxes/{sandbox.sandbox_id}/pause", timeout=LIMIT)
        assert time.monotonic() - began < LIMIT
        began = time.monotonic()
        if paused.status_code == 204:
            resumed = api.post(f"/sandboxes/{sandbox.sandbox_id}/resume", json={"timeout": 60}, timeout=LIMIT)
            assert resumed.status_code in (500, 502, 504), "envd did not answer: that is no sandbox that runs"
            assert resumed.json()["message"]
        assert time.monotonic() - began < LIMIT
        assert other.commands.run("echo still fine").stdout == "still fine\n"
        began = time.monotonic()
        assert api.delete(f"/sandboxes/{sandbox.sandbox_id}", timeout=LIMIT).status_code == 204
        assert time.monotonic() - began < 30
    assert held(daemon) < before + 96 * MIB, "what it sends does not pile up"
    assert api.get(f"/sandboxes/{sandbox.sandbox_id}").status_code == 404
