"""Sandboxes that are paused without memory outlive their daemon, at rest and while they boot."""

import threading

import pytest
from e2b import Sandbox, SandboxState
from support import sandboxes
from support.counting import builds_of
from support.daemon import DEFAULT_DATA_DIR, wait_for

BOOT = {"timeout": 300, "request_timeout": 180}


def test_a_daemon_that_is_killed(make_daemon, host):
    first = make_daemon().start()
    first.create_key()
    sandbox = sandboxes.create(first)
    sandbox.files.write("/home/user/note", "kept")
    assert sandbox.pause(mode="filesystem", **sandboxes.options(first)) is True
    (build,) = builds_of(sandbox.sandbox_id)
    # While it is at rest.
    first.kill9()

    second = make_daemon().start()
    second.key = first.key

    def connect():
        with pytest.raises(Exception):
            Sandbox.connect(sandbox.sandbox_id, **BOOT, **sandboxes.options(second))

    # While it boots.
    connecting = threading.Thread(target=connect)
    connecting.start()
    wait_for("its boot to begin", lambda: any((DEFAULT_DATA_DIR / "build").glob("boot-*/initrd")), 60, every=0.01)
    second.kill9()
    connecting.join()
    assert builds_of(sandbox.sandbox_id) == {build}

    third = make_daemon().start()
    third.key = first.key
    mine = sandboxes.options(third)
    assert not list((DEFAULT_DATA_DIR / "build").glob("boot-*"))
    assert Sandbox.get_info(sandbox.sandbox_id, **mine).state == SandboxState.PAUSED
    resumed = Sandbox.connect(sandbox.sandbox_id, **BOOT, **mine)
    assert resumed.files.read("/home/user/note") == "kept"
    assert not list((DEFAULT_DATA_DIR / "build").glob("boot-*")), "what it was booted with is gone"
    assert resumed.kill(**mine) is True
    assert builds_of(sandbox.sandbox_id) == set()
    assert third.terminate() == 0
    host.assert_clean()
