"""A sandbox with a Python process that counts in its memory: it shows whether the guest goes on where it was."""

from __future__ import annotations

from . import sandboxes
from .daemon import wait_for

COUNTER = "import time\nn = 0\nwhile True:\n    n += 1\n    open('/tmp/count', 'w').write(f'{n}\\n')\n    time.sleep(0.05)\n"


def count(sandbox) -> int:
    """The last whole number that was written."""
    text = sandbox.files.read("/tmp/count")
    return int(text) if text.endswith("\n") else 0


def start_counting(sandbox) -> None:
    sandbox.files.write("/home/user/counter.py", COUNTER)
    sandbox.commands.run("exec python3 /home/user/counter.py", background=True, timeout=0)
    wait_for("the counter to count", lambda: sandbox.files.exists("/tmp/count") and count(sandbox) > 2, 30, every=0.2)


def counting(daemon):
    """A new sandbox that counts."""
    sandbox = sandboxes.create(daemon)
    start_counting(sandbox)
    return sandbox


def goes_on(sandbox, beyond: int | None = None) -> None:
    """Waits until it counts beyond this number, or beyond what it has counted now."""
    beyond = count(sandbox) if beyond is None else beyond
    wait_for("it to go on counting", lambda: count(sandbox) > beyond, 30, every=0.2)
