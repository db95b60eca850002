"""Forks and snapshots when things go wrong: a full disk, a daemon that is killed."""

import subprocess

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from support import sandboxes
from support.counting import builds_of, count_beyond, start_counting, state
from support.daemon import DEFAULT_DATA_DIR, wait_for


def test_a_full_disk_leaves_the_parent_running_and_no_child(daemon, host):
    sandbox = sandboxes.create(daemon)
    mine = sandboxes.options(daemon)
    start_counting(sandbox)
    staging = DEFAULT_DATA_DIR / "storage/.staging"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", str(staging)], check=True)
    try:
        for make in (sandbox.fork, sandbox.create_snapshot):
            with pytest.raises(SandboxException, match="no space left"):
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
