"""A long line of pauses is compacted in the background, and what it needed no more is removed."""

from e2b import Sandbox
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, wait_for

PAUSES = 9


def builds():
    return {path for path in (DEFAULT_DATA_DIR / "storage").iterdir() if not path.name.startswith(".")}


def test_a_long_line_of_pauses_is_compacted(daemon, host):
    before = builds()
    mine = sandboxes.options(daemon)
    sandbox = sandboxes.create(daemon)
    for n in range(PAUSES):
        if n > 0:
            sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
        sandbox.files.write(f"/home/user/{n}", f"{n} " * 50_000)
        sandbox.commands.run("sync")
        assert sandbox.pause(**mine) is True
    # After the last pause or one before: a sandbox that is resumed at once puts it off.
    wait_for("the compaction", lambda: "compacted: pieces" in daemon.log(400), 60)

    sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
    sandbox.commands.run("echo 3 > /proc/sys/vm/drop_caches", user="root")
    for n in range(PAUSES):
        assert sandbox.files.read(f"/home/user/{n}") == f"{n} " * 50_000
    assert sandbox.pause(**mine) is True
    # Those between are gone.
    wait_for("builds to be removed", lambda: len(builds() - before) < PAUSES - 2, 30)
    sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
    assert sandbox.files.read("/home/user/0") == "0 " * 50_000
    assert sandbox.kill(**mine) is True
    assert builds() == before
    assert daemon.terminate() == 0
    host.assert_clean()
