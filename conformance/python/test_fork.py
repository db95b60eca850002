"""Forks through the official Python SDK: children go on from where their parent was, each on its own."""

import time

import pytest
from e2b import Sandbox, SandboxException, SandboxNotFoundException
from support.checks import assert_error_body
from support.counting import builds_of, count_beyond, start_counting, state
from support.daemon import TIME_FACTOR, wait_for

FORKS = 10


@pytest.fixture
def fork():
    """Forks a sandbox; children are killed when the test ends."""
    made = []

    def fork(sandbox, **options):
        options.setdefault("timeout", 600)
        children = sandbox.fork(**options)
        made.extend(c for c in children if isinstance(c, Sandbox))
        for child in children:
            assert isinstance(child, Sandbox), child
        return children

    yield fork
    for child in made:
        child.kill()


# Ten guests that count share the one emulated processor of the test bed.
@pytest.mark.timeout(300 * TIME_FACTOR)
def test_ten_forks_go_on_and_diverge(new_sandbox, fork):
    parent = new_sandbox(metadata={"family": "f"}, envs={"KEPT": "y e s"})
    parent_id = parent.sandbox_id
    pid = start_counting(parent)
    parent.files.write("/home/user/disk", "as it was")
    count_beyond(parent, 3)
    before, token, held, _ = state(parent)
    children = fork(parent, count=FORKS)
    ids = [c.sandbox_id for c in children]
    assert len(set(ids + [parent_id])) == FORKS + 1
    seen = set()
    for n, child in enumerate(children):
        child.files.write("/home/user/name", f"child{n}")
        child.files.write("/home/user/disk", f"changed by {n}")
    for n, child in enumerate(children):
        wait_for(f"fork {n} to go on", lambda: state(child)[3] == f"child{n}", 60, every=0.1)
        now = state(child)
        # The same process, with the memory and the open file that it had, and then its own way.
        assert (now[1], now[2]) == (token, held) and now[0] > before
        assert count_beyond(child, now[0]) > now[0]
        assert [p.pid for p in child.commands.list() if "counter.py" in " ".join([p.cmd, *p.args])] == [pid]
        assert child.files.read("/home/user/disk") == f"changed by {n}"
        said = child.commands.run('echo "$E2B_SANDBOX_ID $KEPT"; head -c 16 /dev/urandom | od -An -tx1').stdout
        assert said.startswith(f"{ids[n]} y e s\n")
        seen.add(said.split("\n", 1)[1])
        info = child.get_info()
        assert info.metadata == {"family": "f"}
        asked = time.time()
        clock = float(child.commands.run("date +%s.%N").stdout)
        # It was set when the child was told who it is; ten at once wait for that on a slow machine.
        assert asked - 5 * TIME_FACTOR < clock < time.time() + 5
    assert len(seen) == FORKS, "no two draw the same random bytes"
    # The parent ran on and knows nothing of it.
    assert parent.files.read("/home/user/disk") == "as it was"
    assert state(parent)[1:] == (token, held, "")
    count_beyond(parent, state(parent)[0])
    assert len(builds_of(parent_id)) == 1, "one checkpoint for all"
    for child in children:
        assert child.kill() is True
    assert builds_of(parent_id) == set(), "it goes with the last that needs it"


def test_the_ends_of_parent_and_child_are_their_own(new_sandbox, fork):
    parent = new_sandbox()
    start_counting(parent)
    first, second = fork(parent, count=2)
    assert first.kill() is True
    count_beyond(parent, state(parent)[0])
    count_beyond(second, state(second)[0])
    assert parent.kill() is True
    before = state(second)[0]
    assert second.pause() is True
    second.connect(timeout=600)
    count_beyond(second, before)
    assert second.commands.run("echo $E2B_SANDBOX_ID").stdout == f"{second.sandbox_id}\n"
    # A grandchild, of a sandbox that was resumed from its own pause.
    (third,) = fork(second)
    before = state(second)[0]
    assert second.kill() is True
    count_beyond(third, before)
    assert third.kill() is True
    ids = [s.sandbox_id for s in (parent, first, second, third)]
    assert builds_of(*ids) == set()


def test_a_line_of_forks_keeps_every_byte(new_sandbox, fork):
    """Memory and disk hash the same in the child of each of several forks, and in the parent."""
    parent = new_sandbox()
    parent.commands.run("head -c 8000000 /dev/urandom > /dev/shm/known; cp /dev/shm/known /home/user/known; sync")
    hashes = "sha256sum /dev/shm/known /home/user/known"
    for life in range(4):
        expected = parent.commands.run(hashes).stdout
        (child,) = fork(parent)
        for path in ("/dev/shm/known", "/home/user/known"):
            change = f"dd if=/dev/urandom bs=4096 count=50 seek={life * 300} conv=notrunc status=none of={path}"
            zero = f"dd if=/dev/zero bs=4096 count=50 seek={life * 300 + 100} conv=notrunc status=none of={path}"
            parent.commands.run(f"{change}; {zero}; sync")
        # From the disk itself, not from what the guest has cached.
        child.commands.run("echo 3 > /proc/sys/vm/drop_caches", user="root")
        assert child.commands.run(hashes).stdout == expected, f"fork {life + 1}"
        child.kill()
    expected = parent.commands.run(hashes).stdout
    parent.commands.run("echo 3 > /proc/sys/vm/drop_caches", user="root")
    assert parent.commands.run(hashes).stdout == expected
    parent.pause()
    parent.connect(timeout=600)
    parent.commands.run("echo 3 > /proc/sys/vm/drop_caches", user="root")
    assert parent.commands.run(hashes).stdout == expected


def test_a_child_has_its_own_token_and_time(new_sandbox, fork):
    parent = new_sandbox()
    (child,) = fork(parent, timeout=77)
    left = (child.get_info().end_at - child.get_info().started_at).total_seconds()
    assert 76 <= left <= 78
    assert child._envd_access_token and child._envd_access_token != parent._envd_access_token
    impostor = Sandbox.connect(child.sandbox_id)
    impostor._envd_api.headers["X-Access-Token"] = parent._envd_access_token
    answer = impostor._envd_api.get("/files", params={"path": "/etc/hostname", "username": "user"})
    assert answer.status_code == 401
    assert child.files.exists("/etc/hostname")


def test_what_cannot_be_forked(new_sandbox, api):
    sandbox = new_sandbox()
    path = f"/sandboxes/{sandbox.sandbox_id}/fork"
    for body in ({"count": 0}, {"count": -1}, {"count": 21}, {"timeout": 0}, {"timeout": -5}):
        assert_error_body(api.post(path, json=body), 400)
    assert "inosuch" in assert_error_body(api.post("/sandboxes/inosuch/fork", json={"count": 1}), 404)
    with pytest.raises(SandboxNotFoundException):
        Sandbox.fork("inosuch")
    sandbox.pause()
    assert sandbox.sandbox_id in assert_error_body(api.post(path, json={"count": 1}), 409)
    with pytest.raises(SandboxException):
        sandbox.fork()
