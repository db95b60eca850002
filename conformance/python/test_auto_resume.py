"""Resume on traffic: a request for a paused sandbox wakes it, if its creator wanted that."""

import threading

import httpx
from e2b import Sandbox, SandboxState
from support.counting import count_beyond, start_counting, state

LIFECYCLE = {"on_timeout": "pause", "auto_resume": True}


def test_a_command_wakes_it(new_sandbox):
    sandbox = new_sandbox(lifecycle=LIFECYCLE, timeout=120)
    assert sandbox.get_info().lifecycle["auto_resume"] is True
    start_counting(sandbox)
    count_beyond(sandbox, 2)
    before, token, _, _ = state(sandbox)
    for _ in range(2):
        assert sandbox.pause() is True
        assert sandbox.get_info().state == SandboxState.PAUSED
        assert sandbox.commands.run("echo awake").stdout == "awake\n"
        info = sandbox.get_info()
        assert info.state == SandboxState.RUNNING
        # The time that it was created with, but no less than the usual.
        assert 290 <= (info.end_at - info.started_at).total_seconds() <= 301
        assert state(sandbox)[1] == token
        before = count_beyond(sandbox, before)


def test_many_requests_wake_it_once(new_sandbox, sandbox_url):
    sandbox = new_sandbox(lifecycle=LIFECYCLE, timeout=600)
    sandbox.commands.run("cd /etc && exec python3 -m http.server 8000", background=True, timeout=0)
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "8000"}
    sandbox.commands.run("until curl -sf localhost:8000/hostname; do sleep 0.1; done")
    expected = sandbox.files.read("/etc/hostname")
    sandbox.pause()
    answers = []

    def ask():
        answers.append(httpx.get(f"{sandbox_url}/hostname", headers=headers, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(a.status_code, a.text) for a in answers] == [(200, expected)] * 6
    info = sandbox.get_info()
    assert info.state == SandboxState.RUNNING
    assert 595 <= (info.end_at - info.started_at).total_seconds() <= 601


def test_others_stay_paused(new_sandbox, sandbox_url):
    for lifecycle in ({"on_timeout": "pause"}, {"on_timeout": "pause", "auto_resume": False}):
        sandbox = new_sandbox(lifecycle=lifecycle)
        assert sandbox.get_info().lifecycle["auto_resume"] is False
        sandbox.pause()
        headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
        assert httpx.get(f"{sandbox_url}/health", headers=headers).status_code == 502
        assert sandbox.get_info().state == SandboxState.PAUSED
        assert Sandbox.kill(sandbox.sandbox_id) is True
    killed = new_sandbox(lifecycle=LIFECYCLE)
    killed.pause()
    assert killed.kill() is True
    headers = {"E2b-Sandbox-Id": killed.sandbox_id, "E2b-Sandbox-Port": "49983"}
    assert httpx.get(f"{sandbox_url}/health", headers=headers).status_code == 502
