"""The bench behind scripts/bench.sh: Sandbox.create against the raw floor, in one run.

The floor is QEMU by hand: its command line is read from one of the daemon's own waiting QEMU
processes and run with plain paths in place of inherited files, in a namespace of its own, with the
template's memfile mapped privately and its rootfs under QEMU's temporary overlay. Its time runs from
the spawn to the guest's first answer on envd's /health. Floors are measured before and after the
creates, so that a drift of the machine shows in both.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from support import sandboxes
from support.daemon import REPO, Daemon, wait_for
from support.with_daemon import start_and_show

DOC = REPO / "docs/performance.md"
BEGIN, END = "<!-- bench:begin (written by make bench) -->", "<!-- bench:end -->"
NAMESPACE = "nidus-bench"


def quantile(values: list[float], q: float) -> float:
    """The smallest value that at least the share `q` of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def waiting_qemu() -> list[str]:
    """The arguments of a QEMU that waits for a snapshot (`-incoming defer`), started by the daemon."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            args = (entry / "cmdline").read_bytes().decode().split("\0")[:-1]
            if args and "qemu-system" in args[0] and "-incoming" in args:
                return [os.readlink(entry / "exe"), *args[1:]]
        except OSError:
            continue
    return []


def by_hand(args: list[str], build: Path, qmp: Path) -> list[str]:
    """The daemon's command line with paths and names in place of inherited file descriptors."""
    out = []
    skip = False
    for i, arg in enumerate(args):
        if skip:
            skip = False
            continue
        value = args[i + 1] if i + 1 < len(args) else ""
        if arg == "-object" and "memory-backend-file" in value:
            parts = [f"mem-path={build / 'memfile'}" if p.startswith("mem-path=") else p for p in value.split(",")]
            out += [arg, ",".join(parts)]
        elif arg == "-blockdev":
            node = json.loads(value)["node-name"]
            out += ["-drive", f"if=none,id={node},file={build / 'rootfs.ext4'},format=raw,snapshot=on"]
        elif arg == "-netdev":
            name = next(p for p in value.split(",") if p.startswith("id="))
            out += [arg, f"tap,{name},ifname=tap0,script=no,downscript=no"]
        elif arg == "-chardev" and "id=qmp" in value:
            out += [arg, f"socket,id=qmp,path={qmp},server=on,wait=off"]
        elif arg == "-chardev" and "fd=" in value:
            out += [arg, "null," + next(p for p in value.split(",") if p.startswith("id="))]
        elif arg.startswith("-") and value and not value.startswith("-"):
            out += [arg, value]
        else:
            out.append(arg)
            continue
        skip = True
    return out


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


class FloorNamespace:
    """A network namespace with the tap that the snapshot's guest expects."""

    def __enter__(self):
        self.was_mounted = os.path.ismount("/run/netns")
        ip("netns", "add", NAMESPACE)
        ip("-n", NAMESPACE, "tuntap", "add", "tap0", "mode", "tap")
        ip("-n", NAMESPACE, "link", "set", "tap0", "address", "02:FC:00:00:00:06")
        ip("-n", NAMESPACE, "addr", "add", "169.254.0.22/30", "dev", "tap0")
        ip("-n", NAMESPACE, "link", "set", "tap0", "up")
        ip("-n", NAMESPACE, "neigh", "add", "169.254.0.21", "lladdr", "02:FC:00:00:00:05", "dev", "tap0", "nud", "permanent")
        return self

    def __exit__(self, *_):
        ip("netns", "del", NAMESPACE)
        if not self.was_mounted:
            subprocess.run(["umount", "/run/netns"], capture_output=True)


def floors(args: list[str], build: Path, count: int, work: Path) -> list[dict[str, float]]:
    """Runs scripts/bench_floor.py inside the namespace; seconds of each phase of each restore."""
    plan = {"args": by_hand(args, build, work / "qmp"), "snapfile": str(build / "snapfile"), "qmp": str(work / "qmp"), "count": count}
    done = subprocess.run(
        ["ip", "netns", "exec", NAMESPACE, sys.executable, str(REPO / "scripts/bench_floor.py")],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the raw floor could not be measured: {done.stderr.strip()}")
    return json.loads(done.stdout)


def creates(daemon: Daemon, count: int) -> dict[str, list[float]]:
    """Seconds of `count` creates in a row, each with a first command and a kill."""
    times = {"create": [], "first command": [], "kill": []}
    mine = sandboxes.options(daemon)
    for n in range(count + 2):  # the first two warm the SDK and its connections up
        began = time.perf_counter()
        sandbox = sandboxes.create(daemon)
        created = time.perf_counter()
        sandbox.commands.run("true")
        ran = time.perf_counter()
        sandbox.kill(**mine)
        killed = time.perf_counter()
        if n >= 2:
            times["create"].append(created - began)
            times["first command"].append(ran - created)
            times["kill"].append(killed - ran)
    return times


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def write_doc(lines: list[str]) -> None:
    """Replaces what stands between the markers of docs/performance.md."""
    text = DOC.read_text() if DOC.exists() else "# Performance\n"
    section = "\n".join([BEGIN, "", *lines, "", END])
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        text = head + section + rest.split(END, 1)[1]
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--creates", type=int, default=30)
    parser.add_argument("--floors", type=int, default=12)
    parser.add_argument("--no-docs", action="store_true", help="leave docs/performance.md alone")
    options = parser.parse_args()

    data_dir = Path(os.environ["NIDUS_DATA_DIR"])
    work = Path("/tmp") / f"nidus-bench-{os.getpid()}"
    work.mkdir()
    daemon = Daemon(data_dir, log_path=work / "nidus.log")
    try:
        start = start_and_show(daemon)
        # The daemon's own List says which build a sandbox runs; with one template there is one memfile.
        warm = sandboxes.create(daemon)
        args = wait_for("a waiting QEMU of the daemon", waiting_qemu, 30)
        warm.kill(**sandboxes.options(daemon))
        memfiles = [p for p in data_dir.rglob("memfile") if ".staging" not in p.parts]
        build = max(memfiles, key=lambda p: p.stat().st_mtime).parent
        with FloorNamespace():
            half = (options.floors + 1) // 2
            floor = floors(args, build, half, work)
            measured = creates(daemon, options.creates)
            floor += floors(args, build, options.floors - half, work)
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        daemon.end()
        shutil.rmtree(work, ignore_errors=True)

    ms = 1000
    p50 = quantile(measured["create"], 0.5) * ms
    p99 = quantile(measured["create"], 0.99) * ms
    floor_p50 = statistics.median(f["total"] for f in floor) * ms
    rows = [
        ("SDK `Sandbox.create` to return", options.creates, p50, p99),
        ("SDK first command (`true`)", options.creates, quantile(measured["first command"], 0.5) * ms, quantile(measured["first command"], 0.99) * ms),
        ("SDK `kill` to return", options.creates, quantile(measured["kill"], 0.5) * ms, quantile(measured["kill"], 0.99) * ms),
        ("raw floor: spawn QEMU to the guest's first answer", len(floor), floor_p50, quantile([f["total"] for f in floor], 0.99) * ms),
        ("- of it: spawn to QMP ready", len(floor), statistics.median(f["spawn"] for f in floor) * ms, quantile([f["spawn"] for f in floor], 0.99) * ms),
        ("- of it: load the state and `cont`", len(floor), statistics.median(f["load"] for f in floor) * ms, quantile([f["load"] for f in floor], 0.99) * ms),
        ("- of it: `cont` to the first answer", len(floor), statistics.median(f["answer"] for f in floor) * ms, quantile([f["answer"] for f in floor], 0.99) * ms),
    ]
    width = max(len(row[0]) for row in rows)
    table = [f"| {'step':<{width}} | {'n':>3} | {'p50 ms':>7} | {'p99 ms':>7} |", f"|{'-' * (width + 2)}|----:|--------:|--------:|"]
    table += [f"| {name:<{width}} | {n:>3} | {a:>7.0f} | {b:>7.0f} |" for name, n, a, b in rows]
    ratio = f"ratio p50/floor: {p50 / floor_p50:.2f} ({p50:.0f} ms / {floor_p50:.0f} ms)"
    accel = args[args.index("-accel") + 1].split(",")[0] if "-accel" in args else "unknown"
    machine = f"{os.cpu_count()} cores ({processor()}), {memory_gib():.0f} GiB, Linux {platform.release()}, {qemu_version(args[0])}, accelerator {accel}"
    print()
    print("\n".join(table))
    print(ratio)
    if not options.no_docs:
        lines = [
            f"Measured {datetime.now(timezone.utc):%Y-%m-%d} with `make bench` on {machine}; "
            f"daemon start with the template present: {start:.1f} s.",
            "",
            *table,
            "",
            f"**{ratio}**",
            "",
            "The floor is one QEMU with the daemon's own command line, started by hand on the same snapshot with",
            "nothing around it; the creates go through the SDK, the REST API, the node and the proxy, one after another.",
        ]
        write_doc(lines)
        print(f"written to {DOC.relative_to(REPO)}")
    return 0


def qemu_version(program: str) -> str:
    out = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return "QEMU " + out.split("version", 1)[1].split()[0]


if __name__ == "__main__":
    sys.exit(main())
