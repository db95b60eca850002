"""A damaged artifact of a paused sandbox is an error that names it, and nobody else's trouble."""

import httpx
import pytest
from e2b import Sandbox, SandboxException
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, wait_for

BLOCK = 4096
STORAGE = DEFAULT_DATA_DIR / "storage"
TEXT = "known bytes "
COUNT = 300_000


def builds():
    return {path for path in STORAGE.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def paused(daemon):
    """A paused sandbox whose file is on its disk alone, not in its memory; and its build's directory."""
    before = builds()
    sandbox = sandboxes.create(daemon)
    sandbox.files.write("/home/user/known", TEXT * COUNT)
    sandbox.commands.run("sync && echo 3 > /proc/sys/vm/drop_caches", user="root")
    sandbox.commands.run("echo here > /tmp/here")
    assert sandbox.pause(**sandboxes.options(daemon)) is True
    (build,) = builds() - before
    return sandbox.sandbox_id, build


class Damage:
    """One bit of a file flipped, or one of each of its blocks; undone at the end."""

    def __init__(self, path, everywhere):
        self.path, self.good = path, path.read_bytes()
        bad = bytearray(self.good)
        for at in range(len(bad) // 2 % BLOCK, len(bad), BLOCK) if everywhere else [len(bad) // 2]:
            bad[at] ^= 0x10
        self.bad = bytes(bad)

    def __enter__(self):
        # In place: the file may be open.
        self.path.chmod(0o644)
        self.path.write_bytes(self.bad)

    def __exit__(self, *_):
        self.path.write_bytes(self.good)
        self.path.chmod(0o444)


def is_right(sandbox):
    """Reads all that is known of the sandbox: right bytes, or an exception."""
    assert sandbox.commands.run("cat /tmp/here").stdout == "here\n"
    assert sandbox.files.read("/home/user/known") == TEXT * COUNT


@pytest.mark.parametrize("everywhere", [False, True], ids=["one-bit", "every-block"])
def test_a_damaged_artifact_is_named(daemon, paused, host, everywhere):
    sandbox_id, build = paused
    mine = sandboxes.options(daemon)
    sibling = sandboxes.create(daemon)
    # What is read while it is resumed: it cannot be.
    whole = ["metadata.json", "memfile.header", "rootfs.ext4.header", "snapfile", "checksums"]
    for name in whole + (["memfile"] if everywhere else []):
        with Damage(build / name, everywhere):
            with pytest.raises(SandboxException) as error:
                Sandbox.connect(sandbox_id, timeout=300, **mine)
            assert f"{name} of build {build.name} is damaged" in str(error.value)
        assert sibling.commands.run("echo fine").stdout == "fine\n"
    # What is read in its course: right bytes or an error, and then the daemon knows why.
    for name in ["rootfs.ext4"] if everywhere else ["memfile"]:
        with Damage(build / name, everywhere):
            try:
                is_right(Sandbox.connect(sandbox_id, timeout=300, **mine))
                assert not everywhere, f"{name} was read although all of it is damaged"
            except (SandboxException, httpx.TransportError):
                # The latter where an answer had begun already: it is cut.
                wait_for(
                    f"the log to name {name}",
                    lambda: f"{name} of build {build.name} is damaged" in daemon.log(400),
                    10,
                )
        assert sibling.commands.run("echo fine").stdout == "fine\n"
    assert sibling.kill(**mine) is True
    Sandbox.kill(sandbox_id, **mine)
    assert daemon.terminate() == 0
    host.assert_clean()


def test_it_is_resumed_once_the_damage_is_undone(daemon, paused, host):
    sandbox_id, build = paused
    mine = sandboxes.options(daemon)
    with Damage(build / "memfile", everywhere=True):
        with pytest.raises(SandboxException, match="memfile of build"):
            Sandbox.connect(sandbox_id, timeout=300, **mine)
    sandbox = Sandbox.connect(sandbox_id, timeout=300, **mine)
    is_right(sandbox)
    assert sandbox.kill(**mine) is True
    assert daemon.terminate() == 0
    host.assert_clean()
