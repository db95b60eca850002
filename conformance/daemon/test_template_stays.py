"""The template's files are the same bytes after 50 sandboxes lived, wrote and died."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR

SANDBOXES = 50


def fingerprints(read: set[str]) -> dict[str, tuple]:
    """Size and SHA-256 of every file of the builds in `read`; of other published builds, which may be
    many gigabytes, what the kernel notes of any write."""
    memfiles = [path for path in DEFAULT_DATA_DIR.rglob("memfile") if ".staging" not in path.parts]
    assert memfiles, f"no build under {DEFAULT_DATA_DIR}"
    whole = {path.parent for path in memfiles if path.parent.name in read}
    assert {folder.name for folder in whole} == read
    found = {}
    for folder in {path.parent for path in memfiles}:
        for path in sorted(folder.iterdir()):
            stat = path.stat()
            found[str(path)] = (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
            if folder in whole:
                with open(path, "rb") as file:
                    found[str(path)] = (stat.st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return found


def test_template_files_are_identical_after_fifty_sandboxes(daemon, host):
    status, templates = daemon.rest("GET", "/templates")
    assert status == 200
    read = {template["buildID"] for template in templates if template["buildStatus"] == "ready"}
    before = fingerprints(read)
    names = {Path(path).name for path in before}
    assert {"rootfs.ext4", "memfile", "snapfile", "metadata.json"} <= names
    mine = sandboxes.options(daemon)

    def live_and_die(n: int) -> str:
        sandbox = sandboxes.create(daemon)
        try:
            # Dirties memory and disk, system files of the template included.
            out = sandbox.commands.run(
                "dd if=/dev/urandom of=/root/noise bs=1M count=2 2>/dev/null; "
                f"echo {n} >> /etc/hosts; rm -f /etc/motd; sync; tail -n1 /etc/hosts",
                user="root",
            ).stdout
        finally:
            assert sandbox.kill(**mine) is True
        return out.strip()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(live_and_die, range(SANDBOXES))) == [str(n) for n in range(SANDBOXES)]
    assert fingerprints(read) == before
    assert daemon.terminate() == 0
    assert fingerprints(read) == before
