"""A guest whose envd was replaced by a program that answers garbage, never, or for ever: it harms itself alone."""

import concurrent.futures
import os
import time
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox
from support.checks import peak
from support.daemon import TIME_FACTOR, wait_for
from support.teams import of_our_daemon

IMPOSTOR = (Path(__file__).resolve().parents[1] / "support/guest_envd.py").read_text()
# Modes whose answers begin as a good one does.
POLITE = ("endless-body", "long-promise", "wrong-json")
MODES = ["garbage", "silent", "endless-headers", "endless-body", "long-promise", "wrong-json"]
# Longest time that a call about such a guest may take. The daemon's own limits are shorter.
LIMIT = 90 * TIME_FACTOR
MIB = 1 << 20


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
        sandbox = Sandbox.create(timeout=int(600 * TIME_FACTOR), metadata={"mode": mode})
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


def suffer(sandbox, api, mode):
    """What the host does with such a guest; each step ends in its time."""
    outcomes = [ask(sandbox, path, 5) for path in ("/health", "/metrics", "/files?path=/x")]
    assert 204 not in outcomes, mode
    url = f"/sandboxes/{sandbox.sandbox_id}"
    began = time.monotonic()
    assert api.get(url).json()["state"] == "running"
    assert api.get(f"{url}/metrics").status_code == 200
    paused = api.post(f"{url}/pause", timeout=LIMIT)
    assert time.monotonic() - began < LIMIT, mode
    if paused.status_code == 204:
        began = time.monotonic()
        resumed = api.post(f"{url}/resume", json={"timeout": int(300 * TIME_FACTOR)}, timeout=LIMIT)
        # Whoever answers as envd does may pass for envd: that is the guest's own affair.
        wanted = (201, 500, 502, 504) if mode in POLITE else (500, 502, 504)
        assert resumed.status_code in wanted, (mode, resumed.text)
        assert time.monotonic() - began < LIMIT, mode
    began = time.monotonic()
    assert api.delete(url, timeout=LIMIT).status_code == 204, mode
    assert time.monotonic() - began < 30 * TIME_FACTOR, mode
    assert api.get(url).status_code == 404, mode


@pytest.mark.timeout(600 * TIME_FACTOR)
def test_such_guests_harm_themselves_alone(impostor, api):
    daemon = int(of_our_daemon("NIDUS_TEST_DAEMON_PID"))
    guests = [impostor(mode) for mode in MODES]
    before = peak(daemon)
    with Sandbox.create(timeout=int(600 * TIME_FACTOR)) as other, concurrent.futures.ThreadPoolExecutor(len(MODES)) as pool:
        all_of_them = [pool.submit(suffer, sandbox, api, mode) for sandbox, mode in zip(guests, MODES)]
        answers = 0
        while not all(f.done() for f in all_of_them):
            began = time.monotonic()
            assert other.commands.run("echo fine").stdout == "fine\n"
            assert time.monotonic() - began < 20 * TIME_FACTOR
            answers += 1
        for f in all_of_them:
            f.result()
        assert answers > 10
    assert peak(daemon) < before + 128 * MIB, "what they send does not pile up"
