"""Forks and snapshots when things go wrong: a full disk, a daemon that is killed; and how long a guest
stands still."""

import re
import subprocess
import time

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from support import sandboxes
from support.counting import builds_of, count_beyond, start_counting, state
from support.daemon import DEFAULT_DATA_DIR, TIME_FACTOR, wait_for


def test_a_full_disk_leaves_the_parent_running_and_no_child(daemon, host):
    sandbox = sandboxes.create(daemon)
    mine = sandboxes.options(daemon)
    start_counting(sandbox)
    staging = DEFAULT_DATA_DIR / "storage/.staging"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", str(staging)], check=True)
    try:
        for make in (sandbox.fork, sandbox.create_snapshot):
            with pytest.raises(SandboxException, match="(?i)no space left"):
                make(**mine)
        assert list(staging.iterdir()) == [], "what was written is gone"
    finally:
        subprocess.run(["umount", str(staging)], check=True)
    assert builds_of(sandbox.sandbox_id) == set()
    count_beyond(sandbox, state(sandbox)[0])
    listed = Sandbox.list(**mine).next_items()
    assert [info.sandbox_id for info in listed] == [sandbox.sandbox_id]
    (child,) = sandbox.fork(**mine)
    count_beyond(child, state(child)[0])
    for one in (child, sandbox):
        assert one.kill(**mine) is True
    assert builds_of(sandbox.sandbox_id) == set()
    assert daemon.terminate() == 0
    host.assert_clean()


def test_forks_and_snapshots_over_a_killed_daemon(make_daemon, host):
    first = make_daemon().start()
    first.create_key()
    parent = sandboxes.create(first)
    mine = sandboxes.options(first)
    start_counting(parent)
    snap = parent.create_snapshot(**mine)
    stopped, running = parent.fork(count=2, **mine)
    before = state(stopped)[0]
    assert stopped.pause(**mine) is True
    first.kill9()

    second = make_daemon().start()
    second.key = first.key
    mine = sandboxes.options(second)
    # What ran is gone; what was stored is there.
    assert [i.sandbox_id for i in Sandbox.list(**mine).next_items()] == [stopped.sandbox_id]
    assert Sandbox.get_info(stopped.sandbox_id, **mine).state == SandboxState.PAUSED
    resumed = Sandbox.connect(stopped.sandbox_id, timeout=300, **mine)
    count_beyond(resumed, before)
    assert resumed.kill(**mine) is True
    wait_for("the forks' build to go", lambda: len(builds_of(parent.sandbox_id)) == 1, 10)
    again = sandboxes.create(second, template=snap.snapshot_id)
    count_beyond(again, 1)
    assert again.kill(**mine) is True
    assert Sandbox.delete_snapshot(snap.snapshot_id, **mine) is True
    assert builds_of(parent.sandbox_id, stopped.sandbox_id, running.sandbox_id) == set()
    assert second.terminate() == 0
    host.assert_clean()


def stops(daemon):
    """Milliseconds for which guests stood still for checkpoints, in order."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", daemon.log_path.read_text())
    unit = {"s": 1000, "ms": 1, "\u00b5s": 0.001}
    found = re.findall(r"then=RunOn stop_time=([0-9.]+)([^0-9. ]+) ", text)
    return [float(number) * unit[name] for number, name in found]


def test_a_guest_stands_still_for_what_it_wrote_not_for_all(daemon, capsys):
    """32 MiB are dirty; beside it, in the same run, a copy of all the guest's memory. The figures are shown and not
    judged: docs/performance.md has them."""
    sandbox = sandboxes.create(daemon)
    mine = sandboxes.options(daemon)
    size = sandbox.get_info(**mine).memory_mb << 20
    copies = []
    for _ in range(3):
        sandbox.commands.run("head -c 33554432 /dev/urandom > /dev/shm/dirty", timeout=60 * TIME_FACTOR)
        snap = sandbox.create_snapshot(**mine)
        assert Sandbox.delete_snapshot(snap.snapshot_id, **mine) is True
        with open(DEFAULT_DATA_DIR / "copied", "wb") as copied:
            # Memory that is really there, as a guest's is.
            source = memoryview(bytes([1]) * size)
            began = time.monotonic()
            for at in range(0, size, 1 << 20):
                copied.write(source[at : at + (1 << 20)])
            copies.append((time.monotonic() - began) * 1000)
        (DEFAULT_DATA_DIR / "copied").unlink()
    stopped = stops(daemon)
    with capsys.disabled():
        print(f"\nstood still for {stopped} ms with 32 MiB dirty; a copy of {size >> 20} MiB: {copies} ms")
    assert len(stopped) == 3
    assert sandbox.kill(**mine) is True


def test_children_for_which_there_is_no_room(make_daemon, host):
    daemon = make_daemon(extra_env={"NIDUS_MAX_SANDBOXES": "3"}).start()
    daemon.create_key()
    mine = sandboxes.options(daemon)
    parent = sandboxes.create(daemon)
    start_counting(parent)
    results = parent.fork(count=4, **mine)
    children = [r for r in results if isinstance(r, Sandbox)]
    refused = [r for r in results if isinstance(r, Exception)]
    assert (len(children), len(refused)) == (2, 2), results
    assert all("3 sandboxes" in str(e) for e in refused), refused
    for child in children:
        count_beyond(child, state(child)[0])
    # Not even one: then nothing of it stays.
    checkpoints = builds_of(parent.sandbox_id)
    assert [isinstance(r, Exception) for r in parent.fork(count=2, **mine)] == [True, True]
    assert builds_of(parent.sandbox_id) == checkpoints and len(checkpoints) == 1
    for one in [*children, parent]:
        assert one.kill(**mine) is True
    assert builds_of(parent.sandbox_id) == set()
    assert daemon.terminate() == 0
    host.assert_clean()
