"""The asynchronous Python SDK: the main job once more, and things at once."""

import asyncio
import uuid

import pytest
from e2b import AsyncSandbox, CommandExitException, FileNotFoundException, PtySize, SandboxNotFoundException, SandboxQuery, TimeoutException


async def killed_after(sandboxes):
    await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))


async def test_the_main_job():
    sandbox = await AsyncSandbox.create(envs={"A": "1"}, metadata={"k": "v"}, timeout=120)
    try:
        chunks = []
        result = await sandbox.commands.run("echo $A; echo err >&2", on_stdout=chunks.append)
        assert (result.stdout, result.stderr, result.exit_code) == ("1\n", "err\n", 0)
        assert "".join(chunks) == "1\n"
        with pytest.raises(CommandExitException) as caught:
            await sandbox.commands.run("exit 9")
        assert caught.value.exit_code == 9

        data = bytes(range(256)) * 4096
        await sandbox.files.write("/home/user/a b.bin", data)
        assert bytes(await sandbox.files.read("/home/user/a b.bin", format="bytes")) == data
        pieces = [piece async for piece in await sandbox.files.read("/home/user/a b.bin", format="stream")]
        assert b"".join(pieces) == data
        assert await sandbox.files.make_dir("/home/user/d") is True
        await sandbox.files.rename("/home/user/a b.bin", "/home/user/d/c")
        assert [entry.name for entry in await sandbox.files.list("/home/user/d")] == ["c"]
        await sandbox.files.remove("/home/user/d")
        with pytest.raises(FileNotFoundException):
            await sandbox.files.get_info("/home/user/d")

        other = await AsyncSandbox.connect(sandbox.sandbox_id)
        assert (await other.commands.run("echo there")).stdout == "there\n"
        await other.set_timeout(100)
        assert (await other.get_info()).metadata == {"k": "v"}
        assert await sandbox.is_running()
    finally:
        assert await sandbox.kill() is True
    assert not await sandbox.is_running()
    with pytest.raises(SandboxNotFoundException):
        await sandbox.get_info()


async def test_background_stdin_connect_and_kill():
    sandbox = await AsyncSandbox.create(timeout=120)
    try:
        cat = await sandbox.commands.run("cat", background=True, stdin=True)
        await sandbox.commands.send_stdin(cat.pid, "typed\n")
        await sandbox.commands.close_stdin(cat.pid)
        assert (await cat.wait()).stdout == "typed\n"

        sleeper = await sandbox.commands.run("sleep 600", background=True)
        again = await sandbox.commands.connect(sleeper.pid)
        await sleeper.disconnect()
        assert sleeper.pid in {p.pid for p in await sandbox.commands.list()}
        assert await again.kill() is True
        with pytest.raises(CommandExitException):
            await again.wait()

        with pytest.raises(TimeoutException):
            await sandbox.commands.run("sleep 600", timeout=1)

        seen = []
        terminal = await sandbox.pty.create(PtySize(rows=30, cols=100), on_data=lambda data: seen.append(bytes(data)))
        await sandbox.pty.send_stdin(terminal.pid, b"stty size; exit 4\n")
        with pytest.raises(CommandExitException) as caught:
            await terminal.wait()
        assert caught.value.exit_code == 4 and b"30 100" in b"".join(seen)
    finally:
        await sandbox.kill()


async def test_sandboxes_created_at_once():
    run = uuid.uuid4().hex
    sandboxes = await asyncio.gather(*(AsyncSandbox.create(metadata={"run": run}, timeout=120) for _ in range(4)))
    try:
        assert len({sandbox.sandbox_id for sandbox in sandboxes}) == 4
        results = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n, sandbox in enumerate(sandboxes)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(4)]
        listed = await AsyncSandbox.list(SandboxQuery(metadata={"run": run})).next_items()
        assert {info.sandbox_id for info in listed} == {sandbox.sandbox_id for sandbox in sandboxes}
    finally:
        await killed_after(sandboxes)
    assert await AsyncSandbox.list(SandboxQuery(metadata={"run": run})).next_items() == []
