#!/usr/bin/env python3
"""The first `run_code` of a sandbox beside later ones, on the template of templates/code-interpreter.

    PYTHONPATH=conformance .nidus/venv/bin/python scripts/bench_interpreter.py [--creates N] [--json]

Against a daemon of its own, on NIDUS_DATA_DIR (default /var/lib/nidus); needs root. Before each create the machine has to be
idle: the machine that is made ready for the next sandbox is not what is measured. The table goes into docs/performance.md by hand.
"""

import argparse
import json
import os
import statistics
import sys
import time

from support.daemon import Daemon

LATER = 10


def busy() -> float:
    """How much of the processors is in use, over half a second."""
    def read():
        fields = [int(n) for n in open("/proc/stat").readline().split()[1:]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    before = read()
    time.sleep(0.5)
    after = read()
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def idle() -> None:
    quiet, end = 0, time.monotonic() + 120
    while quiet < 3 and time.monotonic() < end:
        quiet = quiet + 1 if busy() < 0.1 else 0


def timed(call):
    began = time.perf_counter()
    result = call()
    return (time.perf_counter() - began) * 1e3, result


def measure(creates: int) -> dict:
    from e2b_code_interpreter import Sandbox

    rows = []
    for _ in range(creates + 1):
        idle()
        create, sandbox = timed(lambda: Sandbox.create(timeout=300))
        try:
            runs = [timed(lambda: sandbox.run_code("x = 1\nx + 1")) for _ in range(LATER + 1)]
            assert all(done.text == "2" for _, done in runs)
        finally:
            sandbox.kill()
        rows.append((create, runs[0][0], statistics.median(t for t, _ in runs[1:])))
    # The very first has no machine that stands ready.
    (cold, *warm) = rows
    columns = [statistics.median(column) for column in zip(*warm)]
    return {
        "creates": creates, "create_ms": columns[0], "first_ms": columns[1], "later_ms": columns[2],
        "ratio": columns[1] / columns[2], "worst_ratio": max(first / later for _, first, later in warm),
        "cold_first_ms": cold[1], "cold_ratio": cold[1] / cold[2],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--creates", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    daemon = Daemon(data_dir=os.environ.get("NIDUS_DATA_DIR", "/var/lib/nidus")).start()
    try:
        os.environ.update(daemon.sdk_env())
        from support import interpreter

        interpreter.template()
        seen = measure(args.creates)
    finally:
        daemon.terminate()
    if args.json:
        print(json.dumps(seen))
        return 0
    print("| | median |\n|---|---|")
    print(f"| `Sandbox.create` | {seen['create_ms']:.0f} ms |")
    print(f"| first `run_code` | {seen['first_ms']:.0f} ms |")
    print(f"| later ones | {seen['later_ms']:.0f} ms |")
    print(f"| first / later | {seen['ratio']:.2f} (worst of {seen['creates']}: {seen['worst_ratio']:.2f}) |")
    print(f"| first / later without a machine that stood ready | {seen['cold_ratio']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
