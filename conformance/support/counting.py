"""A process that counts in its memory, and the builds that a sandbox has made of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import sandboxes
from .daemon import TIME_FACTOR, wait_for

# Ten of them at once are not to be all that a slow machine can do.
PAUSE = 0.05 * TIME_FACTOR
COUNTER = f"""
import os
import time
token = os.urandom(8).hex()
# A file without a name: only this process has it.
held = open("/home/user/held", "w+")
os.unlink("/home/user/held")
held.write(token[::-1])
held.flush()
n = 0
while True:
    n += 1
    held.seek(0)
    name = open("/home/user/name").read() if os.path.exists("/home/user/name") else ""
    with open("/tmp/count.new", "w") as f:
        f.write(f"{{n}} {{token}} {{held.read()}} {{name}}")
    os.rename("/tmp/count.new", "/tmp/count")
    time.sleep({PAUSE})
"""


def state(sandbox) -> tuple[int, str, str, str]:
    """The counter's count, its secret, what it reads from the file that it holds open, and the
    name that its sandbox was given."""
    number, token, held, name = sandbox.files.read("/tmp/count").split(" ")
    return int(number), token, held, name


def count(sandbox) -> int:
    return state(sandbox)[0]


def count_beyond(sandbox, least, seconds=30):
    def further():
        seen = count(sandbox)
        return seen if seen > least else 0

    return wait_for(f"the counter to go beyond {least}", further, seconds, every=0.1)


def start_counting(sandbox) -> int:
    """Starts it and returns its process id once it counts."""
    sandbox.files.write("/home/user/counter.py", COUNTER)
    handle = sandbox.commands.run("exec python3 /home/user/counter.py", background=True, timeout=0)
    wait_for("the counter to count", lambda: sandbox.files.exists("/tmp/count"), 30, every=0.1)
    return handle.pid


def counting(daemon, **options):
    """A new sandbox of this daemon that counts."""
    sandbox = sandboxes.create(daemon, **options)
    start_counting(sandbox)
    return sandbox


def builds_of(*sandbox_ids) -> set:
    """The published builds that were made of these sandboxes."""
    storage = Path(os.environ.get("NIDUS_TEST_DATA_DIR", "/var/lib/nidus-test")) / "storage"
    found = set()
    for path in storage.iterdir():
        try:
            metadata = json.loads((path / "metadata.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            # Not published yet, or deleted just now.
            continue
        if metadata.get("guest", {}).get("env_vars", {}).get("E2B_SANDBOX_ID") in sandbox_ids:
            found.add(path)
    return found
