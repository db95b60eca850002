"""Directories under .nidus that are made once, by whichever test process comes first."""

import fcntl
import shutil
from pathlib import Path


def made(folder: Path, name: str, make) -> Path:
    """`folder/name`, filled by `make(directory)` if it is not there: whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / name
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.exists():
            draft = folder / "new"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(wanted)
    return wanted
