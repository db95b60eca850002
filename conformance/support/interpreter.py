"""The template of the code interpreter, built from the definition in the repo by the command line."""

import fcntl
import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DEFINITION = REPO / "templates" / "code-interpreter"
NAME = "code-interpreter-v1"


def template() -> None:
    """Builds it with the daemon that E2B_API_URL names, or finds that nothing has changed."""
    nidus = os.environ.get("NIDUS_BIN", str(REPO / "target" / "release" / "nidus"))
    build = [nidus, "template", "build", str(DEFINITION), "--name", NAME, "--memory", "1024"]
    with open(DEFINITION / "Dockerfile") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


if __name__ == "__main__":
    template()
