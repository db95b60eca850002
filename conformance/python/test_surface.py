"""Every part of the SDK that the other files do not reach, by the synchronous and by the asynchronous SDK: one
text for both, in which `done` awaits what the one answers at once and the other later."""

import asyncio
import hashlib
import inspect
import os
import shutil
import subprocess
import time
import uuid
import zipfile
from types import SimpleNamespace

import e2b
import httpx
import pytest
from e2b import CommandExitException, FilesystemEventType, NotFoundException, PtySize, SandboxNotFoundException
from support.daemon import TIME_FACTOR

KITS = {
    "sync": SimpleNamespace(Sandbox=e2b.Sandbox, Template=e2b.Template),
    "async": SimpleNamespace(Sandbox=e2b.AsyncSandbox, Template=e2b.AsyncTemplate),
}


async def done(value):
    return await value if inspect.isawaitable(value) else value


@pytest.fixture(params=["sync", "async"])
def kit(request):
    return KITS[request.param]


@pytest.fixture
async def box(kit):
    sandbox = await done(kit.Sandbox.create(timeout=600))
    yield sandbox
    await done(sandbox.kill())


async def until(what, condition, seconds=60):
    seconds *= TIME_FACTOR
    deadline = time.monotonic() + seconds
    while not (answer := await done(condition())):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        await asyncio.sleep(0.05)
    return answer


async def test_a_sandboxs_methods(kit, box):
    cls, id = kit.Sandbox, box.sandbox_id
    assert await done(box.is_running())
    for info in (await done(box.get_info()), await done(cls.get_info(id))):
        assert info.sandbox_id == id and info.state == e2b.SandboxState.RUNNING
    await done(box.set_timeout(500))
    await done(cls.set_timeout(id, 500))
    again = await done(cls.connect(id, timeout=500))
    assert (await done(again.commands.run("echo same"))).stdout == "same\n"
    await done((await done(box.connect(timeout=500))).commands.run("true"))
    assert box.get_host(3000).startswith("3000-") and box.sandbox_id in box.get_host(3000)
    await done(box.files.write("/home/user/f", "x"))
    for url in (box.download_url("/home/user/f"), box.upload_url("/home/user/g")):
        assert "signature=" in url
    assert await until("figures", lambda: box.get_metrics())
    assert await done(cls.get_metrics(id))
    await done(box.update_network({"deny_out": ["0.0.0.0/0"]}))
    await done(cls.update_network(id, {}))
    listed = cls.list()
    found = []
    while listed.has_next:
        found += [s.sandbox_id for s in await done(listed.next_items())]
    assert id in found
    assert box.get_mcp_url().startswith("http")
    await done(box.files.make_dir("/etc/mcp-gateway", user="root"))
    await done(box.files.write("/etc/mcp-gateway/.token", "tok", user="root"))
    assert await done(box.get_mcp_token()) == "tok"


async def test_snapshots_forks_and_pauses(kit, box):
    cls, id = kit.Sandbox, box.sandbox_id
    await done(box.files.write("/home/user/kept", "kept"))
    snapshot = await done(box.create_snapshot())
    other = await done(cls.create_snapshot(id))
    listed = [s.snapshot_id for s in await done(box.list_snapshots().next_items())]
    assert {snapshot.snapshot_id, other.snapshot_id} <= set(listed)
    assert snapshot.snapshot_id in [s.snapshot_id for s in await done(cls.list_snapshots(sandbox_id=id).next_items())]
    copy = await done(cls.create(snapshot.snapshot_id, timeout=120))
    assert await done(copy.files.read("/home/user/kept")) == "kept"
    assert await done(copy.kill()) is True and await done(cls.kill(copy.sandbox_id)) is False
    for s in (snapshot, other):
        assert await done(cls.delete_snapshot(s.snapshot_id)) is True
    assert await done(cls.delete_snapshot(snapshot.snapshot_id)) is False
    forks = [*await done(box.fork(count=2)), *await done(cls.fork(id))]
    assert len({f.sandbox_id for f in forks}) == 3
    for f in forks:
        assert await done(f.files.read("/home/user/kept")) == "kept"
        await done(f.kill())
    await done(box.pause())
    assert not await done(box.is_running())
    box = await done(cls.connect(id, timeout=600))
    await done(cls.pause(id))
    box = await done(cls.connect(id, timeout=600))
    await done(box.beta_pause())
    box = await done(cls.connect(id, timeout=600))
    assert await done(box.files.read("/home/user/kept")) == "kept"


async def test_commands_and_their_handles(box):
    handle = await done(box.commands.run("read line; echo got $line; sleep 1000", background=True, stdin=True))
    assert handle.pid in [p.pid for p in await done(box.commands.list())]
    await done(handle.send_stdin("one\n"))
    await done(box.commands.send_stdin(handle.pid, "more\n"))
    await done(handle.disconnect())
    again = await done(box.commands.connect(handle.pid))
    assert await done(again.kill()) is True

    async def is_gone():
        return handle.pid not in [p.pid for p in await done(box.commands.list())]

    await until("the process to go", is_gone)
    assert await done(box.commands.kill(handle.pid)) is False
    reader = await done(box.commands.run("cat; exit 3", background=True, stdin=True))
    await done(reader.send_stdin("typed"))
    await done(reader.close_stdin())
    with pytest.raises(CommandExitException) as caught:
        await done(reader.wait())
    assert (caught.value.exit_code, caught.value.stdout) == (3, "typed")
    other = await done(box.commands.run("cat", background=True, stdin=True))
    await done(box.commands.close_stdin(other.pid))
    assert (await done(other.wait())).exit_code == 0
    with pytest.raises(NotFoundException):
        await done(box.commands.connect(999_999))
    streamed = await done(box.commands.run("cat", background=True, stdin=True))
    await stream(box, box.commands, streamed.pid, [b"a", b"b"])
    await done(box.commands.close_stdin(streamed.pid))
    assert (await done(streamed.wait())).stdout == "ab"


async def stream(box, where, pid, pieces):
    """An input in pieces, as the SDK of the box wants it."""
    if not isinstance(box, e2b.AsyncSandbox):
        where.stream_input(pid, iter(pieces))
        return
    handle = where.stream_input(pid)
    for piece in pieces:
        await done(handle.send(piece))
    await done(handle.close())


async def test_a_terminal(box):
    seen = []
    # The asynchronous one gives its output to a function, the synchronous one to whoever waits.
    listens = lambda hear: {"on_data": hear} if isinstance(box, e2b.AsyncSandbox) else {}  # noqa: E731
    handle = await done(box.pty.create(PtySize(rows=24, cols=80), timeout=60, **listens(seen.append)))
    await done(box.pty.resize(handle.pid, PtySize(rows=30, cols=101)))
    await done(box.pty.send_stdin(handle.pid, b"stty size; exit 0\n"))
    if isinstance(box, e2b.AsyncSandbox):
        await handle.wait()
    else:
        handle.wait(on_pty=seen.append)
    assert b"30 101" in b"".join(bytes(s) for s in seen)
    other = await done(box.pty.create(PtySize(rows=24, cols=80), **listens(lambda _: None)))
    again = await done(box.pty.connect(other.pid, **listens(lambda _: None)))
    await stream(box, box.pty, other.pid, [b"echo streamed > /home/user/", b"s\n"])
    await until("what was typed to be done", lambda: box.files.exists("/home/user/s"))
    await done(again.disconnect())
    assert await done(box.pty.kill(other.pid)) is True


async def test_files(box):
    f = box.files
    assert await done(f.make_dir("/home/user/d")) is True
    await done(f.write("/home/user/d/a", "1"))
    await done(f.write_files([{"path": "/home/user/d/b", "data": b"2"}, {"path": "/home/user/d/c", "data": "3"}]))
    assert sorted(e.name for e in await done(f.list("/home/user/d"))) == ["a", "b", "c"]
    assert (await done(f.get_info("/home/user/d/b"))).size == 1
    assert (await done(f.rename("/home/user/d/b", "/home/user/d/e"))).path == "/home/user/d/e"
    assert await done(f.exists("/home/user/d/e")) and not await done(f.exists("/home/user/d/b"))
    assert await done(f.read("/home/user/d/e")) == "2"
    await done(f.remove("/home/user/d"))
    assert not await done(f.exists("/home/user/d"))


@pytest.mark.parametrize("recursive", [False, True])
async def test_a_directory_that_is_watched(box, recursive):
    await done(box.files.make_dir("/home/user/w/sub"))
    seen = []
    is_async = isinstance(box, e2b.AsyncSandbox)
    listens = {"on_event": seen.append} if is_async else {}
    handle = await done(box.files.watch_dir("/home/user/w", recursive=recursive, include_entry=True, **listens))

    async def events():
        if not is_async:
            seen.extend(handle.get_new_events())
        return {(e.name, e.type) for e in seen}

    await done(box.files.write("/home/user/w/a", "x"))
    await done(box.files.write("/home/user/w/sub/b", "x"))
    await done(box.files.rename("/home/user/w/a", "/home/user/w/c"))
    await done(box.files.remove("/home/user/w/c"))
    wanted = {("a", FilesystemEventType.CREATE), ("a", FilesystemEventType.WRITE), ("a", FilesystemEventType.RENAME), ("c", FilesystemEventType.REMOVE)}

    async def all_there():
        return wanted <= await events()

    await until("what happened in the directory", all_there)
    below = {e for e in await events() if e[0].endswith("sub/b")}
    if recursive:
        await until("what happened below", lambda: has(events, "sub/b"))
    else:
        assert not below
    assert any(e.entry and e.entry.path == "/home/user/w/a" for e in seen if e.type == FilesystemEventType.CREATE)
    await done(handle.stop())
    count = len(seen)
    await done(box.files.write("/home/user/w/after", "x"))
    await done(box.commands.run("true"))
    assert len(seen) == count
    with pytest.raises(NotFoundException):
        await done(box.files.watch_dir("/home/user/none", **listens))


async def has(events, name):
    return any(e[0].endswith(name) for e in await events())


async def test_git(box):
    git = box.git
    await done(git.configure_user("Me", "me@example.test"))
    await done(git.init("/home/user/far.git", bare=True))
    await done(git.init("/home/user/r", initial_branch="main"))
    await done(box.files.write("/home/user/r/a", "one\n"))
    status = await done(git.status("/home/user/r"))
    assert [f.name for f in status.file_status] == ["a"] and status.current_branch == "main"
    await done(git.add("/home/user/r", files=["a"]))
    await done(git.commit("/home/user/r", "first"))
    assert (await done(git.status("/home/user/r"))).is_clean
    await done(git.create_branch("/home/user/r", "side"))
    branches = await done(git.branches("/home/user/r"))
    assert set(branches.branches) == {"main", "side"} and branches.current_branch == "side"
    await done(git.checkout_branch("/home/user/r", "main"))
    await done(git.delete_branch("/home/user/r", "side"))
    await done(git.remote_add("/home/user/r", "origin", "/home/user/far.git"))
    assert await done(git.remote_get("/home/user/r", "origin")) == "/home/user/far.git"
    await done(git.push("/home/user/r", remote="origin", branch="main"))
    await done(git.clone("/home/user/far.git", path="/home/user/copy", branch="main"))
    assert await done(box.files.read("/home/user/copy/a")) == "one\n"
    await done(box.files.write("/home/user/r/a", "two\n"))
    await done(git.restore("/home/user/r", paths=["a"]))
    assert await done(box.files.read("/home/user/r/a")) == "one\n"
    await done(box.files.write("/home/user/r/a", "three\n"))
    await done(git.add("/home/user/r"))
    await done(git.commit("/home/user/r", "second"))
    await done(git.push("/home/user/r"))
    await done(git.pull("/home/user/copy"))
    assert await done(box.files.read("/home/user/copy/a")) == "three\n"
    await done(git.reset("/home/user/r", mode="hard", target="HEAD~1"))
    assert await done(box.files.read("/home/user/r/a")) == "one\n"
    await done(git.set_config("nidus.test", "yes", scope="local", path="/home/user/r"))
    assert await done(git.get_config("nidus.test", scope="local", path="/home/user/r")) == "yes"
    await done(git.dangerously_authenticate("user", "token"))
    stored = await done(box.commands.run("printf 'protocol=https\\nhost=github.com\\n\\n' | git credential fill"))
    assert "password=token" in stored.stdout


async def test_templates(kit):
    name = f"surface-{uuid.uuid4().hex[:8]}"
    T = kit.Template
    template = T().from_template("base").run_cmd("true").set_start_cmd("sleep 1000", "true")
    assert not await done(T.exists(name)) and not await done(T.alias_exists(name))
    info = await done(T.build_in_background(template, name, cpu_count=1, memory_mb=512))

    async def ready():
        status = await done(T.get_build_status(info))
        assert status.status.value != "error", status.reason
        return status.status.value == "ready"

    await until("the build", ready, 120)
    assert await done(T.exists(name)) and await done(T.alias_exists(name))
    assert set((await done(T.assign_tags(f"{name}:default", ["v1", "v2"]))).tags) == {"v1", "v2"}
    assert {t.tag for t in await done(T.get_tags(name))} == {"default", "v1", "v2"}
    await done(T.remove_tags(name, "v2"))
    assert {t.tag for t in await done(T.get_tags(name))} == {"default", "v1"}
    built = await done(T.build(template, name, cpu_count=1, memory_mb=512))
    assert built.build_id
    assert "RUN true" in T.to_dockerfile(T().from_image("x").run_cmd("true")) and T.to_json(template)
    async with httpx.AsyncClient(base_url=os.environ["E2B_API_URL"], headers={"X-API-Key": os.environ["E2B_API_KEY"]}) as rest:
        groups = (await rest.get(f"/templates/{name}/tags/groups?sort=name_asc")).json()
        assert [g["tag"] for g in groups["tags"]] == ["default", "v1"] and groups["nextCursor"] is None
        assert len(groups["tags"][0]["assignments"]) == 2, "both builds were the default one"
        one = (await rest.get(f"/templates/{name}/tags/default/assignments?limit=1")).json()
        rest_of = (await rest.get(f"/templates/{name}/tags/default/assignments", params={"cursor": one["nextCursor"]})).json()
        assert [one["data"][0]["buildId"], rest_of["data"][0]["buildId"]] == [built.build_id, info.build_id]
        assert "base" in str((await rest.get("/default-templates")).json())
        assert (await rest.delete(f"/templates/{name}")).status_code == 204


def archive(folder):
    """A Debian repository of one package, `tiny-hello`."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/bin").mkdir(parents=True)
    control = "Package: tiny-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.test>\nDescription: says hello\n"
    (root / "DEBIAN/control").write_text(control)
    (root / "usr/bin/tiny-hello").write_text("#!/bin/sh\necho hello\n")
    (root / "usr/bin/tiny-hello").chmod(0o755)
    package = folder / "tiny-hello.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, package], check=True, capture_output=True)
    shutil.rmtree(root)
    data = package.read_bytes()
    (folder / "Packages").write_text(f"{control}Filename: ./tiny-hello.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n")


@pytest.mark.parametrize("kit", ["sync"], indirect=True)
async def test_a_builders_helpers(kit, tmp_path):
    name = f"helpers-{uuid.uuid4().hex[:8]}"
    for file in ("one", "two", "three"):
        (tmp_path / file).write_text(file)
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        about = "tiny-1.0.dist-info"
        wheel.writestr("tiny.py", "said = 'tiny'\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", f"tiny.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    T = kit.Template
    template = (
        T(file_context_path=str(tmp_path)).from_template("base")
        .set_user("root").set_workdir("/srv").set_envs({"MADE": "here"})
        .copy("one", "/srv/one").copy_items([{"src": "two", "dest": "/srv/two"}, {"src": "three", "dest": "/srv/three"}])
        .make_dir("/srv/d").make_symlink("/srv/one", "/srv/link").rename("/srv/two", "/srv/d/two").remove("/srv/three")
        .run_cmd("git init -q --initial-branch main r && git -C r -c user.name=a -c user.email=a@b commit -q --allow-empty -m x")
        .git_clone("/srv/r", "/srv/clone").copy("tiny-1.0-py3-none-any.whl", "/tmp/tiny-1.0-py3-none-any.whl").pip_install("/tmp/tiny-1.0-py3-none-any.whl")
        .run_cmd("echo $MADE > made")
    )
    # Its own repository, so that no mirror is needed.
    archive(tmp_path / "repo")
    template = (
        template.copy("repo", "/tmp/repo")
        .run_cmd("rm -rf /etc/apt/sources.list.d/* && echo 'deb [trusted=yes] file:/tmp/repo ./' > /etc/apt/sources.list && chmod -R a+rX /tmp/repo")
        .apt_install(["tiny-hello"]).set_ready_cmd("test -f /srv/made")
    )
    try:
        await done(T.build(template, name, cpu_count=1, memory_mb=512))
        sandbox = await done(kit.Sandbox.create(name, timeout=120))
        said = await done(sandbox.commands.run(
            "cat /srv/link /srv/d/two /srv/made; ls /srv; git -C /srv/clone log --format=%s; python3 -c 'import tiny; print(tiny.said)'; tiny-hello", user="root"))
        await done(sandbox.kill())
        assert said.stdout == "onetwohere\nclone\nd\nlink\nmade\none\nr\nx\ntiny\nhello\n"
    finally:
        httpx.delete(f"{os.environ['E2B_API_URL']}/templates/{name}", headers={"X-API-Key": os.environ["E2B_API_KEY"]}, timeout=60)


async def test_names_of_images(kit):
    """What the server is asked for; images themselves are tried in daemon/test_images.py."""
    T = kit.Template
    for template, image in (
        (T().from_debian_image("bookworm"), "debian:bookworm"), (T().from_ubuntu_image("24.04"), "ubuntu:24.04"),
        (T().from_fedora_image("44"), "fedora:44"), (T().from_alpine_image("3.24"), "alpine:3.24"),
        (T().from_python_image("3.12"), "python:3.12"), (T().skip_cache().from_arch_image("base"), "archlinux:base"),
        (T().from_bun_image("1.2"), "bun:1.2"), (T().from_node_image("22"), "node:22"), (T().from_base_image(), "e2bdev/base"),
        (T().from_dockerfile("FROM debian:bookworm\nRUN true"), "debian:bookworm"),
    ):
        assert f"{image}\n" in T.to_dockerfile(template) + "\n"


async def test_clients_bound_to_their_settings(kit, monkeypatch):
    url, key = os.environ["E2B_API_URL"], os.environ["E2B_API_KEY"]
    monkeypatch.delenv("E2B_API_KEY")
    client = e2b.E2B(api_url=url, api_key=key)
    cls = client.Sandbox if kit is KITS["sync"] else client.AsyncSandbox
    assert isinstance(await done(cls.list().next_items()), list)
    with pytest.raises(SandboxNotFoundException):
        await done(cls.get_info("inobody0000000000000"))
