"""What a daemon leaves behind: nothing after SIGTERM, and after kill -9 nothing once it is back."""

import os
import signal
import threading

import pytest
from e2b import SandboxNotFoundException
from support import intrude, sandboxes
from support.daemon import wait_for


def busy_sandboxes(daemon, count=3):
    """Sandboxes with a command running and something written."""
    made = []
    for _ in range(count):
        sandbox = sandboxes.create(daemon)
        sandbox.commands.run("echo up; while :; do sleep 0.2; done", background=True, timeout=0)
        sandbox.files.write("/home/user/x", "y" * 100_000)
        made.append(sandbox)
    return made


def kinds(lines):
    return {line.split("\t")[0] for line in lines}


def test_kill_9_then_start(make_daemon, host):
    first = make_daemon().start()
    first.create_key()
    busy = busy_sandboxes(first)
    first.kill9()
    orphans = [line for line in host.added() if line.startswith(("process", "namespace", "file", "socket", "nft", "cgroup"))]
    assert {"namespace"} <= kinds(orphans), f"nothing to reclaim would prove nothing: {orphans}"

    second = make_daemon().start()
    second.key = first.key
    old_processes = [line for line in orphans if line.startswith("process")]
    wait_for(
        "processes of the killed daemon to be gone",
        lambda: not set(old_processes) & set(host.added()),
        20,
        every=0.2,
    )
    for sandbox in busy:
        with pytest.raises(SandboxNotFoundException):
            sandbox.get_info(**sandboxes.options(second))
    fresh = [sandboxes.create(second) for _ in range(2)]
    for sandbox in fresh:
        assert sandbox.commands.run("cat /home/user/x 2>/dev/null || echo fresh").stdout == "fresh\n"
    assert second.terminate() == 0
    host.assert_clean()


def test_kill_9_again_and_again(make_daemon, host):
    """Three crashes in a row, each with a sandbox running, leave no more than none."""
    for _ in range(3):
        daemon = make_daemon().start()
        daemon.create_key()
        sandboxes.create(daemon)
        daemon.kill9()
    last = make_daemon().start()
    last.create_key()
    assert sandboxes.create(last).commands.run("echo ok").stdout == "ok\n"
    assert last.terminate() == 0
    host.assert_clean()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_releases_everything(make_daemon, host, how):
    daemon = make_daemon().start()
    daemon.create_key()
    busy_sandboxes(daemon)
    assert "namespace" in kinds(host.added())
    os.kill(daemon.process.pid, how)
    assert daemon.process.wait(60) == 0, daemon.log()
    host.assert_clean()


def test_sigterm_while_sandboxes_are_being_created(make_daemon, host):
    daemon = make_daemon().start()
    daemon.create_key()
    started = threading.Event()
    outcomes = []

    def create():
        try:
            started.set()
            while True:
                sandboxes.create(daemon, retries=0)
                outcomes.append("made")
        except Exception as error:  # whatever the client sees, the daemon must end clean
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=create, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait()
    wait_for("a sandbox to be made", lambda: "made" in outcomes, 60)
    assert daemon.terminate() == 0, daemon.log()
    for thread in threads:
        thread.join(60)
    host.assert_clean()


def test_sigterm_with_nothing_running_and_start_again(make_daemon, host):
    for _ in range(2):
        daemon = make_daemon().start()
        assert daemon.terminate() == 0
    host.assert_clean()


def test_killing_a_sandboxs_vmm_from_outside_is_noticed(host, daemon):
    """A VMM that dies takes its sandbox with it: it is not listed, and its things are released."""
    sandbox = sandboxes.create(daemon)
    other = sandboxes.create(daemon)
    killed = intrude.vmms(daemon)
    assert len(killed) >= 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_for("both sandboxes to be gone", lambda: daemon.rest("GET", "/v2/sandboxes")[1] == [], 30, every=0.2)
    for dead in (sandbox, other):
        with pytest.raises(SandboxNotFoundException):
            dead.get_info(**sandboxes.options(daemon))
    assert sandboxes.create(daemon).commands.run("echo new").stdout == "new\n"
    assert daemon.terminate() == 0
    host.assert_clean()
