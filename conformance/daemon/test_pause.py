"""Paused sandboxes outlive the daemon; a pause that fails leaves the sandbox running."""

import subprocess

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from support import sandboxes
from support.counting import count, count_beyond, counting
from support.daemon import DEFAULT_DATA_DIR


@pytest.mark.parametrize("end", ["terminate", "kill9"])
def test_paused_over_a_restart(make_daemon, host, end):
    first = make_daemon().start()
    first.create_key()
    sandbox = counting(first)
    before = count(sandbox)
    assert sandbox.pause(**sandboxes.options(first)) is True
    getattr(first, end)()

    second = make_daemon().start()
    second.key = first.key
    mine = sandboxes.options(second)
    info = Sandbox.get_info(sandbox.sandbox_id, **mine)
    assert info.state == SandboxState.PAUSED
    resumed = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
    count_beyond(resumed, before)
    assert resumed.kill(**mine) is True
    assert second.terminate() == 0
    host.assert_clean()


def test_a_full_disk_leaves_the_sandbox_running(daemon, host):
    sandbox = counting(daemon)
    mine = sandboxes.options(daemon)
    staging = DEFAULT_DATA_DIR / "storage/.staging"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", str(staging)], check=True)
    try:
        with pytest.raises(SandboxException, match="(?i)no space left"):
            sandbox.pause(**mine)
        assert list(staging.iterdir()) == [], "what was written of the pause is gone"
    finally:
        subprocess.run(["umount", str(staging)], check=True)
    count_beyond(sandbox, count(sandbox))
    assert Sandbox.get_info(sandbox.sandbox_id, **mine).state == SandboxState.RUNNING
    assert sandbox.pause(**mine) is True
    assert sandbox.kill(**mine) is True
    assert daemon.terminate() == 0
    host.assert_clean()
