"""Paused sandboxes outlive the daemon; a pause that fails leaves the sandbox running."""

import subprocess

import pytest
from e2b import Sandbox, SandboxException, SandboxState
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, wait_for

COUNTER = "import time\nn = 0\nwhile True:\n    n += 1\n    open('/tmp/count', 'w').write(f'{n}\\n')\n    time.sleep(0.05)\n"


def count(sandbox):
    """The last whole number that was written."""
    text = sandbox.files.read("/tmp/count")
    return int(text) if text.endswith("\n") else 0


def counting(daemon):
    sandbox = sandboxes.create(daemon)
    sandbox.files.write("/home/user/counter.py", COUNTER)
    sandbox.commands.run("exec python3 /home/user/counter.py", background=True, timeout=0)
    wait_for("the counter to count", lambda: sandbox.files.exists("/tmp/count") and count(sandbox) > 2, 30, every=0.2)
    return sandbox


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
    wait_for("it to go on counting", lambda: count(resumed) > before, 30, every=0.2)
    assert resumed.kill(**mine) is True
    assert second.terminate() == 0
    host.assert_clean()


def test_a_full_disk_leaves_the_sandbox_running(daemon, host):
    sandbox = counting(daemon)
    mine = sandboxes.options(daemon)
    staging = DEFAULT_DATA_DIR / "storage/.staging"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", str(staging)], check=True)
    try:
        with pytest.raises(SandboxException, match="no space left"):
            sandbox.pause(**mine)
        assert list(staging.iterdir()) == [], "what was written of the pause is gone"
    finally:
        subprocess.run(["umount", str(staging)], check=True)
    before = count(sandbox)
    wait_for("it to go on counting", lambda: count(sandbox) > before, 30, every=0.2)
    assert Sandbox.get_info(sandbox.sandbox_id, **mine).state == SandboxState.RUNNING
    assert sandbox.pause(**mine) is True
    assert sandbox.kill(**mine) is True
    assert daemon.terminate() == 0
    host.assert_clean()
