"""Snapshots through the official Python SDK: templates made of running sandboxes."""

import uuid

import pytest
from e2b import NotFoundException, Sandbox, SandboxException, SandboxNotFoundException
from support.checks import assert_error_body
from support.counting import builds_of, count, count_beyond, start_counting, state


@pytest.fixture
def snapshot():
    """Makes snapshots that are deleted when the test ends."""
    made = []

    def snapshot(sandbox, **options):
        info = sandbox.create_snapshot(**options)
        made.append(info.snapshot_id)
        return info

    yield snapshot
    for snapshot_id in made:
        Sandbox.delete_snapshot(snapshot_id)


def listed(**options):
    found, pages = [], Sandbox.list_snapshots(**options)
    while pages.has_next:
        found += [info.snapshot_id for info in pages.next_items()]
    return found


def test_sandboxes_of_a_snapshot_go_on_from_it(new_sandbox, snapshot):
    source = new_sandbox(envs={"FROM": "source", "BOTH": "source"}, metadata={"not": "inherited"})
    source_id = source.sandbox_id
    start_counting(source)
    source.files.write("/home/user/note", "in the snapshot")
    count_beyond(source, 3)
    before, token, held, _ = state(source)
    snap = snapshot(source)
    source.files.write("/home/user/note", "after the snapshot")
    count_beyond(source, state(source)[0])
    assert source.kill() is True
    assert len(builds_of(source_id)) == 1, "it survives the sandbox"
    first = new_sandbox(template=snap.snapshot_id, envs={"BOTH": "new"}, metadata={"m": "1"})
    second = new_sandbox(template=snap.snapshot_id)
    for n, sandbox in enumerate((first, second)):
        assert sandbox.sandbox_id != source_id
        sandbox.files.write("/home/user/name", f"n{n}")
        assert state(sandbox)[1:3] == (token, held)
        assert count_beyond(sandbox, before) > before
        assert sandbox.files.read("/home/user/note") == "in the snapshot"
    said = first.commands.run('echo "$FROM $BOTH $E2B_SANDBOX_ID $E2B_TEMPLATE_ID"').stdout
    assert said == f"source new {first.sandbox_id} {first.get_info().template_id}\n"
    assert second.commands.run('echo "$BOTH"').stdout == "source\n"
    assert (first.get_info().metadata, second.get_info().metadata) == ({"m": "1"}, {})
    assert first.commands.run("od -An -N16 -tx1 /dev/urandom").stdout != second.commands.run(
        "od -An -N16 -tx1 /dev/urandom").stdout


def test_a_snapshot_of_the_disk_alone_is_booted(new_sandbox, snapshot):
    source = new_sandbox(envs={"FROM": "source"}, timeout=600)
    start_counting(source)
    # In the guest's cache at most.
    source.files.write("/home/user/note", "in the snapshot")
    seen, boot = count_beyond(source, 2), "cat /proc/sys/kernel/random/boot_id"
    snap = snapshot(source, mode="filesystem")
    (build,) = builds_of(source.sandbox_id)
    assert {path.name for path in build.iterdir()} == {"rootfs.ext4", "rootfs.ext4.header", "metadata.json", "checksums"}
    source.files.write("/home/user/note", "after the snapshot")
    assert count_beyond(source, seen) > seen, "the source runs on"
    made = [new_sandbox(template=snap.snapshot_id, timeout=600, request_timeout=180) for _ in range(2)]
    boots = {s.commands.run(boot).stdout for s in [source, *made]}
    assert len(boots) == 3
    for sandbox in made:
        assert sandbox.files.read("/home/user/note") == "in the snapshot"
        assert not [p for p in sandbox.commands.list() if "counter.py" in " ".join([p.cmd, *p.args])]
        said = sandbox.commands.run('echo "$FROM $E2B_SANDBOX_ID"').stdout
        assert said == f"source {sandbox.sandbox_id}\n"
    # From here on it is like any other.
    made[0].files.remove("/tmp/count")
    start_counting(made[0])
    _, token, *_ = state(made[0])
    made[0].pause()
    made[0].connect(timeout=600)
    assert state(made[0])[1] == token
    assert count(source) > seen


def test_lists_and_deletion(new_sandbox, snapshot, api):
    sandbox = new_sandbox()
    sandbox_id = sandbox.sandbox_id
    made = [snapshot(sandbox).snapshot_id for _ in range(3)]
    assert len(set(made)) == 3
    assert listed(sandbox_id=sandbox_id) == listed(sandbox_id=sandbox_id, limit=1) == made[::-1]
    assert set(made) <= set(listed()) and listed(sandbox_id="inosuch") == []
    templates = [t["templateID"] for t in api.get("/templates").json()]
    assert not {m.split(":")[0] for m in made} & set(templates), "they are listed apart"
    assert Sandbox.delete_snapshot(made[1]) is True
    assert Sandbox.delete_snapshot(made[1]) is False
    assert listed(sandbox_id=sandbox_id) == [made[2], made[0]]
    assert len(builds_of(sandbox_id)) == 2
    with pytest.raises((NotFoundException, SandboxException)):
        Sandbox.create(made[1])
    for snapshot_id in (made[0], made[2]):
        assert Sandbox.delete_snapshot(snapshot_id) is True
    assert builds_of(sandbox_id) == set()


def test_names(new_sandbox, snapshot, api):
    name = f"snap-{uuid.uuid4().hex[:8]}"
    sandbox = new_sandbox()
    sandbox.files.write("/home/user/n", "1")
    first = snapshot(sandbox, name=name)
    assert first.names and first.names[0].split(":")[0] == name
    sandbox.files.write("/home/user/n", "2")
    again = snapshot(sandbox, name=name)
    assert again.snapshot_id == first.snapshot_id
    assert listed(name=name) == [first.snapshot_id] == listed(sandbox_id=sandbox.sandbox_id)
    for called in (name, first.snapshot_id):
        assert new_sandbox(template=called).files.read("/home/user/n") == "2"
    path = f"/sandboxes/{sandbox.sandbox_id}/snapshots"
    assert "base" in assert_error_body(api.post(path, json={"name": "base"}), 409)
    assert_error_body(api.post(path, json={"name": "No Name"}), 400)


def test_a_sandbox_outlives_its_snapshot(new_sandbox, snapshot):
    source = new_sandbox()
    start_counting(source)
    snap = snapshot(source)
    sandbox = new_sandbox(template=snap.snapshot_id)
    assert Sandbox.delete_snapshot(snap.snapshot_id) is True
    assert listed(sandbox_id=source.sandbox_id) == []
    before = count_beyond(sandbox, 1)
    assert sandbox.pause() is True
    sandbox.connect(timeout=600)
    before = count_beyond(sandbox, before)
    assert sandbox.kill() is True
    assert builds_of(source.sandbox_id, sandbox.sandbox_id) == set()
    count_beyond(source, state(source)[0])


def test_what_has_no_snapshot(new_sandbox, api):
    with pytest.raises(SandboxNotFoundException):
        Sandbox.create_snapshot("inosuch")
    sandbox = new_sandbox()
    sandbox.pause()
    assert_error_body(api.post(f"/sandboxes/{sandbox.sandbox_id}/snapshots", json={}), 409)
    assert len(builds_of(sandbox.sandbox_id)) == 1
