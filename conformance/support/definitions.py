"""Templates of the repo's own definitions (templates/), built by the command line."""

import fcntl
import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def build(folder: str, name: str, *options: str) -> None:
    """Builds it with the daemon that E2B_API_URL names, or finds that nothing has changed."""
    nidus = os.environ.get("NIDUS_BIN", str(REPO / "target" / "release" / "nidus"))
    definition = REPO / "templates" / folder
    # One after another, also of several test processes: the second finds what the first has made.
    with open(definition / "Dockerfile") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([nidus, "template", "build", str(definition), "--name", name, *options], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
