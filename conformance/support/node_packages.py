"""npm and bun from the package registry, for guests that have no network."""

import fcntl
import shutil
import subprocess
import tarfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = REPO / ".nidus" / "npm"
# An npm for Debian 12's Node 18, and a bun for processors without AVX2.
WANTED = {"npm": "npm@10.9.4", "bun": "@oven/bun-linux-x64-baseline@1.2.23"}


def packages() -> Path:
    """A directory with `npm` and `bun`, the contents of these packages; made once."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    made = PACKAGES / "-".join(w.rsplit("@", 1)[1] for w in WANTED.values())
    with open(PACKAGES / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            draft = PACKAGES / "new"
            shutil.rmtree(draft, ignore_errors=True)
            for name, package in WANTED.items():
                (draft / name).mkdir(parents=True)
                packed = subprocess.run(["npm", "pack", "--silent", package], cwd=draft, check=True, capture_output=True, text=True).stdout
                with tarfile.open(draft / packed.split()[-1]) as tar:
                    tar.extractall(draft / name, filter="data")
            draft.rename(made)
    return made
