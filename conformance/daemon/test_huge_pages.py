"""Guests in pages of 2 MiB: the host's pool lends them and gets them back."""

import os
import re
from pathlib import Path

import pytest
from e2b import Sandbox
from support import sandboxes
from support.counting import count, count_beyond, counting
from support.daemon import wait_for

pytestmark = pytest.mark.skipif(os.environ.get("NIDUS_VMM") != "firecracker", reason="only Firecracker gives a guest huge pages")

POOL = Path("/proc/sys/vm/nr_hugepages")
HUGE = {"NIDUS_HUGE_PAGES": "true", "NIDUS_WARM": "0", "NIDUS_BASE_MEMORY_MB": "256"}


def free() -> int:
    return int(re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))


@pytest.fixture
def pool():
    before = POOL.read_text()
    yield POOL
    POOL.write_text(before)


def test_huge_pages(make_daemon, host, pool):
    pool.write_text("300")
    assert free() == 300, "this host cannot keep so many huge pages"
    daemon = make_daemon(extra_env=HUGE).start()
    daemon.create_key()
    mine = sandboxes.options(daemon)
    sandbox = counting(daemon)
    assert free() < 300 and sandbox.commands.run("echo hello").stdout == "hello\n"
    before = count(sandbox)
    assert sandbox.pause(**mine) is True
    wait_for("its pages to come back", lambda: free() == 300, 10)
    resumed = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
    count_beyond(resumed, before)
    assert resumed.kill(**mine) is True
    wait_for("its pages to come back", lambda: free() == 300, 10)
    assert daemon.terminate() == 0
    host.assert_clean()


def test_a_host_without_them_says_so(make_daemon, host, pool):
    pool.write_text("0")
    daemon = make_daemon(extra_env={**HUGE, "NIDUS_BASE_MEMORY_MB": "258"})
    assert daemon.spawn().wait(300) == 1
    assert re.search(r"129 huge pages.* 0 .*vm.nr_hugepages", daemon.log(1)), daemon.log()
    host.assert_clean()
