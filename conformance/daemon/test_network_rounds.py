"""Sandboxes come and go, and the host's network is as it was: not a rule, route, link or descriptor more."""

import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from support import sandboxes
from support.daemon import wait_for

ROUNDS = int(os.environ.get("NIDUS_TEST_ROUNDS", "100"))


def out(*args):
    return subprocess.run(args, capture_output=True, text=True, check=True).stdout


def plain(text):
    """Without the numbers in which slots differ, the random addresses of links, and ids."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    return re.sub(r"\d+", "N", re.sub(r"[0-9a-f]*(:+[0-9a-f]+){3,}", "MAC", text))


def descriptors(pid):
    """What a process has open. Its database is left out: connections to it are a pool's, up to four."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            where = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if "/nidus.db" not in where:
            yield where


def network(daemon):
    """What [looked_at] finds; of a network in which a namespace went while it was looked at, nothing."""
    try:
        return looked_at(daemon)
    except subprocess.CalledProcessError as e:
        return Counter([f"in motion: {e}"])


def looked_at(daemon):
    """How many of each kind of thing there are: in the host's namespace and in those of the slots."""
    found = Counter()
    spaces = [line.split()[0] for line in out("ip", "netns", "list").splitlines()]
    for space in ["", *spaces]:
        where = ("ip", "netns", "exec", space) if space else ()
        for what, command in {
            "link": ("ip", "-o", "link", "show"),
            "address": ("ip", "-o", "addr", "show"),
            "route": ("ip", "route", "show", "table", "all"),
            "rule": ("ip", "rule", "show"),
            "nft": ("nft", "-s", "list", "ruleset"),
        }.items():
            lines = out(*where, *command).splitlines()
            found.update(f"{'slot' if space else 'host'} {what}: {plain(line)}" for line in lines if "valid_lft" not in line)
    found["namespaces"] = len(spaces)
    found.update(f"descriptor of {plain(where)}" for where in descriptors(daemon.process.pid))
    found["threads that wait in a namespace"] = len(
        {os.readlink(f"/proc/{daemon.process.pid}/task/{t}/ns/net") for t in os.listdir(f"/proc/{daemon.process.pid}/task")})
    return found


def test_rounds_leave_exactly_the_slots_of_the_pool(daemon):
    mine = sandboxes.options(daemon)

    def live_and_die(n):
        network = {"network": {"allow_out": ["a.example"], "deny_out": ["0.0.0.0/0"]}} if n % 3 == 0 else {}
        sandbox = sandboxes.create(daemon, **network)
        assert sandbox.kill(**mine) is True

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(live_and_die, range(8)))
    before = {}

    def at_rest():
        """The pool and the warm set are full, and no slot is more than that: twice the same."""
        now = network(daemon)
        same = now == before.get("now") and len(now) > 1
        before["now"] = now
        return same and now

    first = wait_for("the pool to be at rest", at_rest, 60, every=3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(live_and_die, range(ROUNDS)))
    last = {}

    def as_before():
        last.update(now=network(daemon))
        return last["now"] == first

    try:
        wait_for("the network to be as before", as_before, 60, every=0.5)
    except TimeoutError:
        more, less = last["now"] - first, first - last["now"]
        raise AssertionError(f"{ROUNDS} rounds left {dict(more)} and took {dict(less)}") from None
    print(f"    {ROUNDS} rounds: {first['namespaces']} namespaces, {sum(v for k, v in first.items() if ' nft' in k)} lines of rules, "
          f"{sum(v for k, v in first.items() if k.startswith('descriptor'))} descriptors, before and after")
