"""Pauses that keep the disk alone, through the official Python SDK: files stay, and the guest boots anew."""

import json

import httpx
import pytest
from e2b import Sandbox, SandboxState
from e2b.exceptions import ServiceBusyException
from support.checks import assert_error_body
from support.counting import builds_of, count_beyond, start_counting, state
from support.daemon import wait_for

MIB = 1 << 20
# The guest boots, which takes a while under emulation.
BOOT = {"timeout": 300, "request_timeout": 180}


def boot_id(sandbox):
    return sandbox.commands.run("cat /proc/sys/kernel/random/boot_id").stdout


def names(build):
    return {path.name for path in build.iterdir()}


def test_files_stay_and_processes_go(new_sandbox, sandbox_url):
    sandbox = new_sandbox(envs={"KEPT": "y e s"}, metadata={"m": "1"}, timeout=300)
    sandbox_id, first_boot = sandbox.sandbox_id, boot_id(sandbox)
    start_counting(sandbox)
    sandbox.files.write("/dev/shm/volatile", "in memory")
    # Last: it is in the guest's cache at most.
    sandbox.files.write("/home/user/note", "before the pause")
    assert sandbox.pause(mode="filesystem") is True
    assert sandbox.get_info().state == SandboxState.PAUSED
    (build,) = builds_of(sandbox_id)
    assert names(build) == {"rootfs.ext4", "rootfs.ext4.header", "metadata.json", "checksums"}
    size = sum(path.stat().st_blocks * 512 for path in build.iterdir())
    assert size < 8 * MIB, size
    assert json.loads((build / "metadata.json").read_text())["filesystem_only"] is True

    resumed = Sandbox.connect(sandbox_id, **BOOT)
    assert resumed.sandbox_id == sandbox_id
    assert resumed.files.read("/home/user/note") == "before the pause"
    second_boot = boot_id(resumed)
    assert second_boot != first_boot
    assert resumed.files.exists("/dev/shm/volatile") is False
    assert not [p for p in resumed.commands.list() if "counter.py" in " ".join([p.cmd, *p.args])]
    assert resumed.commands.run('echo "$KEPT $E2B_SANDBOX_ID"').stdout == f"y e s {sandbox_id}\n"
    assert resumed.get_info().metadata == {"m": "1"}
    # Its token is asked for as before.
    headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983"}
    assert httpx.post(f"{sandbox_url}/process.Process/List", json={}, headers=headers).status_code == 401
    assert builds_of(sandbox_id) == {build}
    assert names(build) == {"rootfs.ext4", "rootfs.ext4.header", "metadata.json", "checksums"}

    # From here on it is as any other.
    resumed.files.remove("/tmp/count")
    start_counting(resumed)
    before = count_beyond(resumed, 2)
    assert resumed.pause() is True
    assert len(builds_of(sandbox_id)) == 2
    resumed.connect(timeout=300)
    count_beyond(resumed, before)
    assert boot_id(resumed) == second_boot
    assert resumed.pause(keep_memory=False) is True
    resumed.connect(**BOOT)
    assert boot_id(resumed) != second_boot
    assert resumed.files.read("/home/user/note") == "before the pause"
    assert resumed.kill() is True
    assert builds_of(sandbox_id) == set()


def test_known_bytes_over_many_boots(new_sandbox):
    sandbox = new_sandbox(timeout=600)
    known = "/home/user/known"
    sandbox.commands.run(f"head -c {16 * MIB} /dev/urandom > {known}")
    for life in range(3):
        # Parts that change, and parts that become zeros.
        sandbox.commands.run(
            f"dd if=/dev/urandom bs=4096 count=50 seek={life * 300} conv=notrunc status=none of={known};"
            f"dd if=/dev/zero bs=4096 count=50 seek={life * 300 + 100} conv=notrunc status=none of={known}")
        expected = sandbox.commands.run(f"sha256sum {known}").stdout
        assert sandbox.pause(mode="filesystem") is True
        sandbox.connect(**BOOT)
        assert sandbox.commands.run(f"sha256sum {known}").stdout == expected, f"after boot {life + 1}"
    sandbox.pause(mode="filesystem")
    assert sandbox.kill() is True
    assert builds_of(sandbox.sandbox_id) == set()


def test_the_end_of_its_time(new_sandbox):
    sandbox = new_sandbox(lifecycle={"on_timeout": {"action": "pause", "mode": "filesystem"}}, timeout=600)
    before = boot_id(sandbox)
    sandbox.files.write("/home/user/note", "kept")
    sandbox.set_timeout(2)
    wait_for("it to be paused", lambda: sandbox.get_info().state == SandboxState.PAUSED, 30, every=0.2)
    sandbox.connect(**BOOT)
    assert boot_id(sandbox) != before
    assert sandbox.files.read("/home/user/note") == "kept"


def test_traffic_does_not_boot_it(new_sandbox, sandbox_url):
    sandbox = new_sandbox(lifecycle={"on_timeout": "pause", "auto_resume": True})
    sandbox.pause(mode="filesystem")
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    assert httpx.get(f"{sandbox_url}/health", headers=headers).status_code == 502
    assert sandbox.get_info().state == SandboxState.PAUSED
    sandbox.connect(**BOOT)
    assert sandbox.commands.run("echo up").stdout == "up\n"


def test_a_reboot_that_is_asked_for(new_sandbox):
    sandbox = new_sandbox(envs={"KEPT": "yes"}, timeout=600)
    start_counting(sandbox)
    sandbox.files.write("/home/user/note", "kept")
    sandbox.commands.run("sync")
    token, first_boot = state(sandbox)[1], boot_id(sandbox)
    # One that runs stays as it is.
    Sandbox.connect(sandbox.sandbox_id, timeout=600, on_resume="reboot")
    assert state(sandbox)[1] == token
    sandbox.pause()
    (build,) = builds_of(sandbox.sandbox_id)
    sums = (build / "checksums").read_bytes()
    sandbox.connect(**BOOT, on_resume="reboot")
    second_boot = boot_id(sandbox)
    assert second_boot != first_boot
    assert not [p for p in sandbox.commands.list() if "counter.py" in " ".join([p.cmd, *p.args])]
    assert sandbox.files.read("/home/user/note") == "kept"
    assert sandbox.commands.run('echo "$KEPT"').stdout == "yes\n"
    assert (build / "checksums").read_bytes() == sums and names(build) >= {"memfile", "snapfile"}, "its memory is as it was"
    # Where there is no memory, it says nothing new.
    sandbox.pause(mode="filesystem")
    sandbox.connect(**BOOT, on_resume="reboot")
    assert boot_id(sandbox) not in (first_boot, second_boot)
    assert sandbox.files.read("/home/user/note") == "kept"
    assert sandbox.kill() is True
    assert builds_of(sandbox.sandbox_id) == set()


def test_a_guest_that_does_not_answer_is_not_paused(new_sandbox, sandbox_url):
    sandbox = new_sandbox(timeout=600)
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}

    def is_silent():
        try:
            httpx.get(f"{sandbox_url}/health", headers=headers, timeout=2)
        except httpx.TimeoutException:
            return True

    sandbox.commands.run("(sleep 1; kill -STOP $(pgrep -x envd)) > /dev/null 2>&1 &", user="root")
    wait_for("envd to stand still", is_silent, 30, every=0.2)
    with pytest.raises(ServiceBusyException, match="runs on"):
        sandbox.pause(mode="filesystem", request_timeout=120)
    assert sandbox.get_info().state == SandboxState.RUNNING
    assert builds_of(sandbox.sandbox_id) == set()


def test_what_does_not_fit_together_is_refused(api):
    new = {"templateID": "base", "timeout": 60, "autoPauseMemory": False}
    assert "autoPause" in assert_error_body(api.post("/v2/sandboxes", json=new), 400)
    new |= {"autoPause": True, "autoResume": {"enabled": True}}
    assert "autoResume" in assert_error_body(api.post("/v2/sandboxes", json=new), 400)
