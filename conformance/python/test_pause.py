"""Pause and resume through the official Python SDK: what was in memory and on disk goes on."""

import threading
import time

import pytest
from e2b import NotFoundException, Sandbox, SandboxException, SandboxNotFoundException, SandboxQuery, SandboxState
from support.checks import assert_error_body
from support.counting import builds_of, count_beyond, start_counting
from support.daemon import wait_for

MIB = 1 << 20


def states(sandbox_id, *wanted):
    """The states in which a list with these states shows the sandbox."""
    found, pages = [], Sandbox.list(query=SandboxQuery(state=list(wanted)) if wanted else None)
    while pages.has_next:
        found += [info.state for info in pages.next_items() if info.sandbox_id == sandbox_id]
    return found


def random_bytes(sandbox):
    return sandbox.commands.run("head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'").stdout


def test_pause_and_connect(new_sandbox):
    sandbox = new_sandbox(metadata={"m": "1"}, envs={"KEPT": "y e s"}, timeout=300)
    sandbox.files.write("/home/user/note", "before the pause")
    pid = start_counting(sandbox)
    before = count_beyond(sandbox, 3)
    assert sandbox.pause() is True
    assert sandbox.is_running() is False
    resumed = Sandbox.connect(sandbox.sandbox_id, timeout=300)
    assert resumed.sandbox_id == sandbox.sandbox_id
    after = count_beyond(resumed, before)
    assert count_beyond(resumed, after) > after
    assert [p.pid for p in resumed.commands.list() if "counter.py" in " ".join([p.cmd, *p.args])] == [pid]
    assert resumed.files.read("/home/user/note") == "before the pause"
    assert resumed.commands.run('echo "$KEPT $E2B_SANDBOX_ID"').stdout == f"y e s {sandbox.sandbox_id}\n"
    assert resumed.get_info().metadata == {"m": "1"}
    # The clock is the host's again.
    skew = float(resumed.commands.run("date +%s.%N").stdout) - time.time()
    assert abs(skew) < 5, skew
    # The object from before the pause works too.
    assert sandbox.commands.run("echo still").stdout == "still\n"


def test_states_of_a_paused_one(new_sandbox, api):
    sandbox = new_sandbox(metadata={"a": "b"})
    sandbox_id = sandbox.sandbox_id
    running = sandbox.get_info()
    assert states(sandbox_id) == states(sandbox_id, SandboxState.RUNNING) == [SandboxState.RUNNING]
    assert states(sandbox_id, SandboxState.PAUSED) == []
    assert sandbox.pause() is True
    assert states(sandbox_id) == states(sandbox_id, SandboxState.PAUSED) == [SandboxState.PAUSED]
    assert states(sandbox_id, SandboxState.RUNNING) == []
    info = sandbox.get_info()
    assert info.state == SandboxState.PAUSED
    assert (info.metadata, info.template_id, info.cpu_count, info.memory_mb) == (
        running.metadata, running.template_id, running.cpu_count, running.memory_mb)
    assert sandbox.pause() is False, "it is paused already"
    for path, body in (("timeout", {"timeout": 60}), ("refreshes", {"duration": 60})):
        assert_error_body(api.post(f"/sandboxes/{sandbox_id}/{path}", json=body), 404)
    assert sandbox_id in assert_error_body(api.post(f"/sandboxes/{sandbox_id}/pause"), 409)
    assert api.post(f"/sandboxes/{sandbox_id}/resume", json={"timeout": 120}).status_code == 201
    assert_error_body(api.post(f"/sandboxes/{sandbox_id}/resume", json={"timeout": 120}), 409)
    assert states(sandbox_id) == [SandboxState.RUNNING]
    end = sandbox.get_info().end_at
    answer = api.post(f"/sandboxes/{sandbox_id}/connect", json={"timeout": 5})
    assert (answer.status_code, answer.json()["sandboxID"]) == (200, sandbox_id)
    assert sandbox.get_info().end_at >= end, "connecting never shortens a life"


def test_unknown_ones(api):
    for path in ("pause", "resume", "connect"):
        body = None if path == "pause" else {"timeout": 60}
        assert "inosuch" in assert_error_body(api.post(f"/sandboxes/inosuch/{path}", json=body), 404)
    with pytest.raises((NotFoundException, SandboxNotFoundException)):
        Sandbox.pause("inosuch")


def test_killing_a_paused_one(new_sandbox):
    sandbox = new_sandbox()
    sandbox.pause()
    assert len(builds_of(sandbox.sandbox_id)) == 1
    assert sandbox.kill() is True
    assert builds_of(sandbox.sandbox_id) == set(), "a killed sandbox leaves no build"
    assert sandbox.kill() is False
    assert states(sandbox.sandbox_id) == []
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_two_resumes_have_different_random_state(new_sandbox):
    sandbox = new_sandbox()
    seen = [random_bytes(sandbox)]
    for _ in range(2):
        sandbox.pause()
        sandbox.connect(timeout=300)
        seen.append(random_bytes(sandbox))
    assert len(set(seen)) == 3 and all(len(s) == 64 for s in seen)


def test_a_line_of_pauses_keeps_every_byte(new_sandbox):
    """Memory and disk hash the same after each of several pauses, of which each changes some."""
    sandbox = new_sandbox()
    sandbox.commands.run("head -c 20000000 /dev/urandom > /dev/shm/known; cp /dev/shm/known /home/user/known; sync")
    hashes = "sha256sum /dev/shm/known /home/user/known"
    expected = sandbox.commands.run(hashes).stdout
    for life in range(4):
        sandbox.pause()
        sandbox.connect(timeout=300)
        assert sandbox.commands.run(hashes).stdout == expected, f"after pause {life + 1}"
        # Changes in the middle, and a part that becomes zeros.
        change = f"dd if=/dev/urandom bs=4096 count=50 seek={life * 300} conv=notrunc status=none of="
        zero = f"dd if=/dev/zero bs=4096 count=50 seek={life * 300 + 100} conv=notrunc status=none of="
        for path in ("/dev/shm/known", "/home/user/known"):
            sandbox.commands.run(f"{change}{path}; {zero}{path}; sync")
        expected = sandbox.commands.run(hashes).stdout
        # From the disk itself, not from what the guest has cached.
        sandbox.commands.run("echo 3 > /proc/sys/vm/drop_caches", user="root")
        assert sandbox.commands.run(hashes).stdout == expected
    assert sandbox.kill() is True
    assert builds_of(sandbox.sandbox_id) == set(), "all pauses of the line are gone"


def test_only_what_changed_is_stored(new_sandbox, capsys):
    """20 MiB of memory and 5 MiB of disk that a sandbox touched."""
    sandbox = new_sandbox()
    sandbox.commands.run("true")
    sandbox.pause()
    sandbox.connect(timeout=300)
    builds = builds_of(sandbox.sandbox_id)
    sandbox.commands.run(
        "head -c 20971520 /dev/urandom > /dev/shm/m;"
        "dd if=/dev/urandom of=/root/d bs=1M count=5 iflag=fullblock oflag=direct status=none; sync", user="root")
    sandbox.pause()
    (new,) = builds_of(sandbox.sandbox_id) - builds
    memory, disk = (stored(new / name) for name in ("memfile", "rootfs.ext4"))
    with capsys.disabled():
        print(f"\nstored of 20 MiB memory and 5 MiB disk: {memory / MIB:.1f} and {disk / MIB:.1f} MiB")
    assert memory >= 20 * MIB and disk >= 5 * MIB
    assert memory + disk <= 1.25 * 25 * MIB


def test_the_end_of_its_time_pauses_it_if_so_asked(new_sandbox):
    sandbox = new_sandbox(lifecycle={"on_timeout": "pause"}, timeout=600)
    start_counting(sandbox)
    before = count_beyond(sandbox, 1)
    sandbox.set_timeout(2)
    wait_for("it to be paused", lambda: sandbox.get_info().state == SandboxState.PAUSED, 30, every=0.2)
    sandbox.connect(timeout=300)
    count_beyond(sandbox, before)


def test_a_connection_from_before_the_pause_fails_cleanly(new_sandbox):
    sandbox = new_sandbox()
    handle = sandbox.commands.run("echo up; sleep 600", background=True, timeout=0)
    events = iter(handle)
    assert next(events)[0] == "up\n"
    assert sandbox.pause() is True
    with pytest.raises(SandboxException):
        for _ in events:
            pass
    sandbox.connect(timeout=300)
    again = sandbox.commands.connect(handle.pid)
    assert again.kill() is True


def test_rapid_rounds_and_races_have_one_outcome(new_sandbox, api):
    sandbox = new_sandbox()
    sandbox_id = sandbox.sandbox_id
    start_counting(sandbox)
    last = count_beyond(sandbox, 1)
    for _ in range(3):
        outcomes = []

        def call(path, body=None):
            outcomes.append((path, api.post(f"/sandboxes/{sandbox_id}/{path}", json=body).status_code))

        threads = [threading.Thread(target=call, args=("pause",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [("pause", 204), ("pause", 409)]
        outcomes.clear()
        threads = [threading.Thread(target=call, args=("connect", {"timeout": 300})) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [("connect", 200), ("connect", 201)]
        last = count_beyond(sandbox, last)
    outcomes.clear()
    pausing = threading.Thread(target=call, args=("pause",))
    pausing.start()
    assert sandbox.kill() is True
    pausing.join()
    assert outcomes[0][1] in (204, 404)
    assert states(sandbox_id) == []


def stored(path) -> int:
    return path.stat().st_blocks * 512
