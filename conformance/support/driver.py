"""Says which VMM the daemon's templates were saved by; fails unless it is the one of NIDUS_VMM, with KVM."""

import json
import os
import sys

from .daemon import DEFAULT_DATA_DIR


def main() -> int:
    wanted = os.environ["NIDUS_VMM"]
    found = [json.loads(path.read_text())["vmm"] for path in DEFAULT_DATA_DIR.glob("storage/*/metadata.json")]
    # QEMU emulates where it cannot accelerate, which is not what is to be tested.
    good = bool(found) and all(vmm["driver"] == wanted and vmm.get("accel") in (None, "kvm") for vmm in found)
    print(f"templates were saved by {found}")
    print(f"test driver_is_{wanted} ... {'ok' if good else 'FAILED'}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
