"""npm and bun from the package registry, for guests that have no network."""

import subprocess
import tarfile
from pathlib import Path

from . import definitions, once

PACKAGES = definitions.REPO / ".nidus" / "npm"
# An npm for Debian 12's Node 18, and a bun for processors without AVX2.
WANTED = {"npm": "npm@10.9.4", "bun": "@oven/bun-linux-x64-baseline@1.2.23"}


def fill(draft: Path) -> None:
    for name, package in WANTED.items():
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=draft, check=True, capture_output=True, text=True).stdout
        with tarfile.open(draft / packed.split()[-1]) as tar:
            tar.extractall(draft / name, filter="data")


def packages() -> Path:
    """A directory with `npm` and `bun`, the contents of these packages; made once."""
    return once.made(PACKAGES, "-".join(w.rsplit("@", 1)[1] for w in WANTED.values()), fill)
