"""Much of everything: many commands, many at once, large files, a stream of a gibibyte."""

import concurrent.futures
import hashlib
import os

import pytest
from support.checks import peak
from support.daemon import TIME_FACTOR, wait_for
from support.teams import of_our_daemon

MIB = 1 << 20

pytestmark = pytest.mark.timeout(600 * TIME_FACTOR)


def envd_descriptors(sbx):
    """How many descriptors envd has open: connections, which clients and the proxy keep for a while, and others."""
    targets = sbx.commands.run("find /proc/$(pgrep -ox envd)/fd -type l -printf '%l\\n'", user="root").stdout.splitlines()
    sockets = sum(t.startswith("socket:") for t in targets)
    return sockets, len(targets) - sockets


def forget_peak(sbx):
    sbx.commands.run("echo 5 > /proc/$(pgrep -ox envd)/clear_refs", user="root")


def resident(sbx):
    """The most bytes of memory that envd has held since its peak was forgotten."""
    return int(sbx.commands.run("awk '/VmHWM/ {print $2}' /proc/$(pgrep -ox envd)/status", user="root").stdout) << 10


def test_five_hundred_commands_one_after_another(sbx):
    sockets, others = envd_descriptors(sbx)
    for n in range(500):
        result = sbx.commands.run(f"printf '%s' out-{n}; printf '%s' err-{n} >&2")
        assert (result.stdout, result.stderr, result.exit_code) == (f"out-{n}", f"err-{n}", 0)
    now = envd_descriptors(sbx)
    assert now[0] <= sockets + 2 and now[1] <= others + 1, (sockets, others, now)
    assert len(sbx.commands.list()) == 0


def test_fifty_commands_at_once_lose_no_byte(sbx):
    _, others = envd_descriptors(sbx)
    wanted = "".join(f"{n}\n" for n in range(1, 20001))

    def run(n):
        return sbx.commands.run(f"seq 1 20000; echo {n} >&2", timeout=300 * TIME_FACTOR, request_timeout=300 * TIME_FACTOR)

    sockets = []
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            results = list(pool.map(run, range(50)))
        for n, result in enumerate(results):
            assert result.stdout == wanted and result.stderr == f"{n}\n", n
        now = envd_descriptors(sbx)
        assert now[1] <= others + 1
        sockets.append(now[0])
    # Connections are used again: a hundred commands have not left a hundred of them.
    assert max(sockets) < 80, sockets


def test_two_hundred_mebibytes_up_and_down(sbx, folder):
    pieces = [os.urandom(MIB) for _ in range(8)]
    whole = b"".join(pieces * 25)
    digest = hashlib.sha256(whole).hexdigest()
    forget_peak(sbx)
    sbx.files.write(f"{folder}/large", whole, request_timeout=600 * TIME_FACTOR)
    del whole
    assert sbx.commands.run(f"sha256sum {folder}/large", timeout=300 * TIME_FACTOR).stdout.split()[0] == digest
    seen = hashlib.sha256()
    size = 0
    for chunk in sbx.files.read(f"{folder}/large", format="stream", request_timeout=600 * TIME_FACTOR):
        seen.update(chunk)
        size += len(chunk)
    assert (size, seen.hexdigest()) == (200 * MIB, digest)
    assert resident(sbx) < 64 * MIB, "envd does not hold what goes through it"
    sbx.files.remove(f"{folder}/large")


@pytest.mark.timeout(1200 * TIME_FACTOR)
def test_a_gibibyte_of_output_and_constant_memory_on_both_sides(sbx):
    size = 1 << 30
    seen = hashlib.sha256()
    count = 0

    def on_stdout(text):
        nonlocal count
        count += len(text)
        seen.update(text.encode())

    daemon = int(of_our_daemon("NIDUS_TEST_DAEMON_PID"))
    forget_peak(sbx)
    peaks = {pid: peak(pid) for pid in (daemon, os.getpid())}
    command = f"yes {'x' * 1023} | head -c {size}"
    result = sbx.commands.run(command, on_stdout=on_stdout, retain_output=False, timeout=1100 * TIME_FACTOR, request_timeout=1200 * TIME_FACTOR)
    assert result.exit_code == 0 and count == size
    wanted = hashlib.sha256()
    for _ in range(1 << 10):
        wanted.update(("x" * 1023 + "\n").encode() * 1024)
    assert seen.hexdigest() == wanted.hexdigest()
    for pid, before in peaks.items():
        assert peak(pid) < before + 64 * MIB, "daemon" if pid == daemon else "client"
    assert resident(sbx) < 64 * MIB


def test_a_reader_that_stands_still_stops_the_command_and_loses_nothing(sbx):
    """Back-pressure reaches the process; the guest's memory does not fill with what nobody reads."""
    forget_peak(sbx)
    handle = sbx.commands.run("yes y | head -c 300M", background=True, retain_output=False, timeout=600 * TIME_FACTOR, request_timeout=600 * TIME_FACTOR)
    output = iter(handle)
    first = next(output)
    busy = lambda: sbx.commands.run("ps -C yes -o cputimes= | head -1", user="root").stdout.strip()
    before = wait_for("the process to stand still", lambda: (now := busy()) and now == busy() and now, 60)
    assert resident(sbx) < 64 * MIB
    count = len(first[0] or "") + sum(len(out or "") for out, _, _ in output)
    assert before and count == 300 * MIB
