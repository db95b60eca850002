"""Volumes that sandboxes have mounted: what is written here is read there, now and after a pause."""

import hashlib
import json
import uuid
from pathlib import Path

import pytest
from e2b import AsyncSandbox, AsyncVolume, CommandExitException, InvalidArgumentException, Sandbox, SandboxException, Volume
from support.daemon import TIME_FACTOR, wait_for
from support.teams import new_team

INTRUDER = (Path(__file__).resolve().parents[1] / "support/guest_nfs.py").read_text()
SECONDS = int(600 * TIME_FACTOR)


@pytest.fixture(scope="module")
def volume():
    volume = Volume.create(f"m-{uuid.uuid4().hex[:8]}")
    yield volume
    Volume.destroy(volume.volume_id)


@pytest.fixture(scope="module")
def box(volume):
    with Sandbox.create(timeout=SECONDS, volume_mounts={"/mnt/data": volume}) as sandbox:
        yield sandbox


@pytest.fixture
def run(box):
    return lambda command, user="user": box.commands.run(command, user=user, timeout=120 * TIME_FACTOR).stdout


@pytest.fixture
def folder(run):
    path = f"/mnt/data/t-{uuid.uuid4().hex[:8]}"
    run(f"mkdir {path}")
    return path


def inside(folder):
    """The same place, as the volume's own API has it."""
    return folder.removeprefix("/mnt/data")


def test_both_sides_see_what_the_other_writes(volume, box, run, folder):
    box.files.write(f"{folder}/guest", "from the guest")
    assert volume.read_file(f"{inside(folder)}/guest") == "from the guest"
    assert volume.get_info(f"{inside(folder)}/guest").uid == 1000
    volume.write_file(f"{inside(folder)}/host", "from outside", mode=0o644)
    assert run(f"cat {folder}/host") == "from outside"
    volume.write_file(f"{inside(folder)}/host", "changed outside", mode=0o644, force=True)
    wait_for("the change to be seen", lambda: run(f"cat {folder}/host") == "changed outside", 5)
    volume.remove(f"{inside(folder)}/guest")
    wait_for("the removal to be seen", lambda: not box.files.exists(f"{folder}/guest"), 5)
    info = box.get_info()
    assert [(m["name"], m["path"]) for m in info.volume_mounts] == [(volume.name, "/mnt/data")]


def test_it_is_a_file_system(run, folder):
    run(f"""cd {folder} && set -e
        printf one > a; printf two >> a; test "$(cat a)" = onetwo
        mv a b; ln b hard; ln -s b soft; test "$(cat soft hard)" = onetwoonetwo; test "$(stat -c %h b)" = 2
        truncate -s 3 b; test "$(cat hard)" = one
        chmod 640 b; test "$(stat -c %a b)" = 640; touch -d '2020-02-02 02:02:02.5 UTC' b; test "$(stat -c %Y b)" = 1580608922
        mkdir -p d/e/f; ! rmdir d 2>/dev/null; rm -r d; test ! -e d
        printf '#!/bin/sh\\necho ran' > script; chmod 755 script; test "$(./script)" = ran
        mkfifo p; (echo through > p &); test "$(cat p)" = through
        exec 3>>log; echo first >&3; rm log; echo second >&3; exec 3>&-
        (flock -n 9 && ! flock -n {folder}/lock true) 9>lock
    """)
    assert run(f"cd {folder}; for i in $(seq 1500); do echo $i > n$i; done; ls | grep -c '^n'; cat n* | sort -n | sha256sum").split()[0] == "1500"
    assert "nfs" in run("stat -f -c %T /mnt/data")


def test_large_files_are_exact(volume, run, folder):
    said = run(f"head -c 67108864 /dev/urandom > {folder}/large; sha256sum < {folder}/large").split()[0]
    seen = hashlib.sha256()
    for piece in volume.read_file(f"{inside(folder)}/large", format="stream"):
        seen.update(piece)
    assert seen.hexdigest() == said
    # Into the middle, by pages.
    run(f"""python3 -c "
import mmap
with open('{folder}/large', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 0)
    m[1000003:1000007] = b'here'
    m.flush()
" """)
    whole = bytes(volume.read_file(f"{inside(folder)}/large", format="bytes"))
    assert whole[1000003:1000007] == b"here" and len(whole) == 67108864


def test_a_database_in_it_holds(run, folder):
    out = run(f"""python3 -c "
import sqlite3
d = sqlite3.connect('{folder}/db')
d.execute('create table t (n)')
for n in range(20):
    with d: d.execute('insert into t values (?)', (n,))
print(d.execute('select sum(n) from t').fetchone()[0], d.execute('pragma integrity_check').fetchone()[0])
" """)
    assert out == "190 ok\n"


def test_users_have_their_own_rights(box, run, folder):
    run(f"mkdir {folder}/closed; echo secret > {folder}/closed/f; echo s > {folder}/rootonly; chmod 600 {folder}/rootonly; chmod 700 {folder}/closed", user="root")
    for command in (f"cat {folder}/rootonly", f"ls {folder}/closed", f"cat {folder}/closed/f", f"echo x > {folder}/rootonly",
                    f"chmod 666 {folder}/rootonly", f"chown user {folder}/rootonly", f"touch {folder}/closed/g"):
        with pytest.raises(CommandExitException) as refused:
            run(command)
        assert "ermission denied" in refused.value.stderr or "not permitted" in refused.value.stderr, command
    assert run(f"cat {folder}/closed/f", user="root") == "secret\n"
    run(f"cp /bin/id {folder}/id; chmod 4755 {folder}/id", user="root")
    assert run(f"stat -c %a {folder}/id") == "755\n", "no file lends its owner's rights"
    with pytest.raises(CommandExitException):
        run(f"mknod {folder}/disk b 254 0", user="root")


def test_two_sandboxes_share_it(volume, box, folder):
    with Sandbox.create(timeout=SECONDS, volume_mounts={"/data": volume.name}) as other:
        place = f"/data{inside(folder)}"
        box.files.write(f"{folder}/f", "one")
        assert other.files.read(f"{place}/f") == "one"
        other.commands.run(f"echo two >> {place}/f")
        wait_for("the other's line", lambda: box.files.read(f"{folder}/f") == "onetwo\n", 10)


def test_pauses_and_forks_keep_it(volume, new_sandbox):
    box = new_sandbox(volume_mounts={"/mnt/data": volume}, timeout=SECONDS)
    name = uuid.uuid4().hex[:8]
    # It has a file open and its directory is there, before, while and after.
    box.commands.run(
        f"mkdir /mnt/data/{name}; cd /mnt/data/{name}; i=0; while :; do i=$((i+1)); echo $i >> lines; sleep 0.05; done", background=True
    )

    def lines():
        return [int(n) for n in bytes(volume.read_file(f"/{name}/lines", format="bytes")).split()] if volume.exists(f"/{name}/lines") else []

    wait_for("its first lines", lambda: len(lines()) > 5, 30)
    for _ in range(2):
        box.pause()
        before = len(lines())
        assert len(lines()) == before
        volume.write_file(f"/{name}/meanwhile", str(before), mode=0o644, force=True)
        box.connect(timeout=SECONDS)
        wait_for("it to go on", lambda: len(lines()) > before + 5, 60)
        assert box.commands.run(f"cat /mnt/data/{name}/meanwhile").stdout == str(before)
    found = lines()
    assert found == list(range(1, len(found) + 1)), "not one was lost or written twice"
    child, = box.fork(timeout=SECONDS)
    child.files.write(f"/mnt/data/{name}/child", "here")
    assert box.files.read(f"/mnt/data/{name}/child") == "here"
    child.kill()
    box.pause(keep_memory=False)
    box.connect(timeout=SECONDS)
    assert box.files.read(f"/mnt/data/{name}/child") == "here", "it is mounted when the guest boots, too"


def test_a_snapshots_sandboxes_have_what_they_ask_for(volume, new_sandbox):
    box = new_sandbox(volume_mounts={"/mnt/data": volume}, timeout=SECONDS)
    name = uuid.uuid4().hex[:8]
    box.files.write(f"/mnt/data/{name}", "x")
    snapshot = box.create_snapshot()
    without = new_sandbox(template=snapshot.snapshot_id, timeout=SECONDS)
    assert without.commands.run("ls -A /mnt/data; grep -c ' nfs ' /proc/mounts || true").stdout == "0\n"
    other = Volume.create(f"m-{uuid.uuid4().hex[:8]}")
    try:
        moved = new_sandbox(template=snapshot.snapshot_id, timeout=SECONDS, volume_mounts={"/mnt/data": other, "/mnt/more": volume})
        assert moved.commands.run(f"ls -A /mnt/data; cat /mnt/more/{name}").stdout == "x"
        moved.kill()
    finally:
        Volume.destroy(other.volume_id)
        Sandbox.delete_snapshot(snapshot.snapshot_id)


def test_a_volume_that_is_deleted_takes_nothing_with_it(new_sandbox):
    gone = Volume.create(f"m-{uuid.uuid4().hex[:8]}")
    box = new_sandbox(volume_mounts={"/mnt/gone": gone}, timeout=SECONDS)
    box.files.write("/mnt/gone/f", "x")
    Volume.destroy(gone.volume_id)
    with pytest.raises(CommandExitException) as stale:
        box.commands.run("sleep 1.2; ls /mnt/gone", timeout=60 * TIME_FACTOR)
    assert "tale file handle" in stale.value.stderr
    assert box.commands.run("echo fine").stdout == "fine\n"
    box.pause()
    box.connect(timeout=SECONDS)
    assert box.commands.run("echo fine; ls -A /mnt/gone").stdout == "fine\n"
    assert not box.get_info().volume_mounts


async def test_the_async_sdk():
    volume = await AsyncVolume.create(f"m-{uuid.uuid4().hex[:8]}")
    sandbox = await AsyncSandbox.create(timeout=SECONDS, volume_mounts={"/v": volume})
    await sandbox.files.write("/v/f", "x")
    assert await volume.read_file("/f") == "x"
    await sandbox.kill()
    assert await AsyncVolume.destroy(volume.volume_id)


@pytest.mark.parametrize("mounts", [
    [{"name": "not-there", "path": "/mnt/a"}], [{"name": "{name}", "path": "mnt"}], [{"name": "{name}", "path": "/"}],
    [{"name": "{name}", "path": "/usr"}], [{"name": "{name}", "path": "/a/../b"}], [{"name": "{name}", "path": "/a\nb"}],
    [{"name": "{name}", "path": "/a"}, {"name": "{name}", "path": "/a/b"}], [{"name": "{name}", "path": f"/m{n}"} for n in range(17)],
    [{"name": "{name}"}], [{"path": "/a"}], ["x"], "x",
], ids=lambda m: json.dumps(m)[:60])
def test_what_cannot_be_mounted_is_refused(api, volume, mounts):
    body = json.loads(json.dumps(mounts).replace("{name}", volume.name))
    answer = api.post("/sandboxes", json={"templateID": "base", "volumeMounts": body})
    assert answer.status_code == 400 and answer.json()["message"], answer.text


def test_volumes_are_of_their_team(volume):
    with new_team().client() as theirs:
        answer = theirs.post("/sandboxes", json={"templateID": "base", "volumeMounts": [{"name": volume.name, "path": "/a"}]})
        assert answer.status_code == 400 and volume.name in answer.text
    for wrong in ("nothing", volume.volume_id):
        with pytest.raises((InvalidArgumentException, SandboxException)):
            Sandbox.create(volume_mounts={"/a": wrong})


def test_a_guest_that_speaks_nfs_itself_gets_no_further(volume, box, new_sandbox):
    """Handles that are made up or another's, names that lead out, garbage, records without an end."""
    other = Volume.create(f"m-{uuid.uuid4().hex[:8]}")
    other.write_file("/secret", "theirs")
    try:
        for sandbox, export in ((box, volume.volume_id), (new_sandbox(timeout=SECONDS), "")):
            sandbox.files.write("/tmp/intruder.py", INTRUDER)
            out = sandbox.commands.run(f"python3 /tmp/intruder.py '{export}' {other.volume_id}", user="root", timeout=300 * TIME_FACTOR).stdout
            assert out.count("\n") == 1 and int(out.split()[0]) > 15, out
        assert box.commands.run("ls -d /mnt/data").stdout == "/mnt/data\n", "and the kernel's own client goes on"
    finally:
        Volume.destroy(other.volume_id)
