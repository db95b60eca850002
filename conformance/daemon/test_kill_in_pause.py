"""`kill -9` of the daemon at random moments of a pause or a checkpoint, from before it begins until after it is
answered: each sandbox is paused and can be resumed, or is reported lost with the reason; nothing is half there.

NIDUS_TEST_ROUNDS says how often (default 2), NIDUS_TEST_SEED repeats a run (it is printed).
"""

import http.client
import os
import random
import re
import threading
import time
from collections import Counter

import pytest
from e2b import Sandbox
from support import sandboxes
from support.counting import builds_of, count_beyond, counting, state
from support.daemon import DEFAULT_DATA_DIR, TIME_FACTOR, wait_for

ROUNDS = int(os.environ.get("NIDUS_TEST_ROUNDS", "2"))
SEED = int(os.environ.get("NIDUS_TEST_SEED") or random.randrange(1 << 32))

STORAGE = DEFAULT_DATA_DIR / "storage"
ARTIFACTS = {"checksums", "memfile", "memfile.header", "metadata.json", "rootfs.ext4", "rootfs.ext4.header", "snapfile"}

# What a round begins: a first pause, a checkpoint, the pause of a sandbox that was paused before.
KINDS = ["pause", "checkpoint", "second pause"]
# Moments are spread over this much of the time from the request to the answer.
BEYOND = 1.3

# Known bytes on the disk and in memory.
FILES = "/home/user/known /dev/shm/known"
MAKE = f"for f in {FILES}; do head -c 2097152 /dev/urandom > $f; done"
SUMS = f"sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum {FILES}"


class Subject:
    """A sandbox that counts, and what is known of it."""

    def __init__(self, daemon):
        self.sandbox = counting(daemon)
        self.id = self.sandbox.sandbox_id
        self.sandbox.commands.run(MAKE)
        self.sums = self.sandbox.commands.run(SUMS, user="root").stdout
        self.seen = state(self.sandbox)

    def pause_and_resume(self, daemon):
        mine = sandboxes.options(daemon)
        assert self.sandbox.pause(**mine) is True
        self.sandbox = Sandbox.connect(self.id, timeout=600, **mine)

    def goes_on(self, sandbox, seen):
        """Whether it goes on from where it was or later, with all that it had."""
        now = state(sandbox)
        assert now[0] >= seen[0] and now[1:] == seen[1:], f"{now} after {seen}"
        count_beyond(sandbox, now[0])
        assert sandbox.commands.run(SUMS, user="root").stdout == self.sums


class Request(threading.Thread):
    """Asks for a pause or a checkpoint; `answer` stays None if the daemon ends before it answers."""

    def __init__(self, daemon, subject, kind):
        super().__init__(daemon=True)
        self.call = f"/sandboxes/{subject.id}/{'snapshots' if kind == 'checkpoint' else 'pause'}"
        self.server = daemon
        self.sent = threading.Event()
        self.answer = None
        self.start()
        self.sent.wait()

    def run(self):
        self.sent.set()
        began = time.monotonic()
        try:
            self.answer = self.server.rest("POST", self.call, {})
        except (OSError, http.client.HTTPException):
            pass
        self.took = time.monotonic() - began


def subject_for(daemon, kind):
    subject = Subject(daemon)
    if kind == "second pause":
        subject.pause_and_resume(daemon)
    return subject


def spans(daemon):
    """How long each kind takes here, in seconds: the shorter of two."""
    took = {}
    for kind in KINDS * 2:
        subject = subject_for(daemon, kind)
        request = Request(daemon, subject, kind)
        request.join()
        assert request.answer[0] in (201, 204), request.answer
        took[kind] = min(request.took, took.get(kind, request.took))
        if kind == "checkpoint":
            assert daemon.rest("DELETE", f"/templates/{request.answer[1]['snapshotID']}")[0] == 204
        assert daemon.rest("DELETE", f"/sandboxes/{subject.id}")[0] == 204
    return took


def reported(daemon, subject):
    """Whether the daemon said of this sandbox that it, or what it did last, is lost, and why."""
    said = [line for line in daemon.log(1000).splitlines() if subject.id in line]
    assert any(re.search(r"the daemon (was killed|ended) while .* lost", line) for line in said), daemon.log(1000)


def everything_is_whole():
    assert list((STORAGE / ".staging").iterdir()) == []
    for build in STORAGE.iterdir():
        if build.name != ".staging":
            assert {path.name for path in build.iterdir()} == ARTIFACTS, build


def after_a_pause(daemon, subject, request, stored, earlier):
    """`stored`: the build was there when the daemon ended; `earlier`: what was seen before an earlier pause."""
    mine = sandboxes.options(daemon)
    status, detail = daemon.rest("GET", f"/sandboxes/{subject.id}")
    if not stored:
        assert request.answer is None
        reported(daemon, subject)
        if earlier is None:
            assert status == 404, detail
            assert daemon.rest("POST", f"/sandboxes/{subject.id}/connect", {"timeout": 60})[0] == 404
            return "lost"
    assert (status, detail.get("state")) == (200, "paused"), detail
    resumed = Sandbox.connect(subject.id, timeout=600, **mine)
    subject.goes_on(resumed, subject.seen if stored else earlier)
    assert resumed.kill(**mine) is True
    return "paused" if stored else "paused as it was before"


def after_a_checkpoint(daemon, subject, request):
    mine = sandboxes.options(daemon)
    # It ran, so it is gone with the daemon, whatever became of the checkpoint.
    assert daemon.rest("GET", f"/sandboxes/{subject.id}")[0] == 404
    reported(daemon, subject)
    kept = [s["snapshotID"] for s in daemon.rest("GET", f"/snapshots?sandboxID={subject.id}")[1]]
    if request.answer is not None:
        assert kept == [request.answer[1]["snapshotID"]]
    # No build but those that can be used.
    assert len(builds_of(subject.id)) == len(kept) <= 1
    for snapshot in kept:
        child = sandboxes.create(daemon, template=snapshot)
        subject.goes_on(child, subject.seen)
        assert child.kill(**mine) is True
        assert Sandbox.delete_snapshot(snapshot, **mine) is True
    return "lost, with a snapshot" if kept else "lost"


def phase(request, stored):
    if request.answer is not None:
        return "answered"
    return "stored" if stored else "being written" if any((STORAGE / ".staging").iterdir()) else "not begun"


@pytest.mark.timeout((180 + 20 * ROUNDS) * TIME_FACTOR)
def test_kill_9_in_a_pause(make_daemon, host, capsys):
    def start(key=None):
        # Without machines in reserve it starts faster.
        daemon = make_daemon(extra_env={"NIDUS_WARM": "0"}).start()
        daemon.key = key or daemon.create_key()
        return daemon

    def say(text):
        with capsys.disabled():
            print(text, flush=True)

    chance = random.Random(SEED)
    daemon = start()
    took = spans(daemon)
    say(f"\nNIDUS_TEST_SEED={SEED}; " + ", ".join(f"a {k} takes {1000 * s:.0f} ms" for k, s in took.items()))
    # One in each of as many equal parts of the time, in any order.
    moments = [BEYOND * (n + chance.random()) / ROUNDS for n in range(ROUNDS)]
    chance.shuffle(moments)
    outcomes = Counter()
    for n, moment in enumerate(moments):
        kind = KINDS[n % len(KINDS)]
        subject = subject_for(daemon, kind)
        earlier, subject.seen = (subject.seen if kind == "second pause" else None), state(subject.sandbox)
        before = builds_of(subject.id)
        delay = moment * took[kind]
        request = Request(daemon, subject, kind)
        time.sleep(delay)  # the moment that is tried
        daemon.kill9()
        request.join()
        stored = bool(builds_of(subject.id) - before)
        when = phase(request, stored)
        say(f"round {n + 1}: {kind}, killed after {1000 * delay:.0f} ms ({when})")
        if request.answer is not None:
            assert request.answer[0] in (201, 204), request.answer

        daemon = start(daemon.key)
        everything_is_whole()
        if kind == "checkpoint":
            outcome = after_a_checkpoint(daemon, subject, request)
        else:
            outcome = after_a_pause(daemon, subject, request, stored, earlier)
        outcomes[kind, when, outcome] += 1
        say(f"round {n + 1}: {outcome}")
        wait_for("its builds to go", lambda: builds_of(subject.id) == set(), 10)
        everything_is_whole()
        assert daemon.rest("GET", "/v2/sandboxes?state=running,paused")[1] == []
    for (kind, when, outcome), count in sorted(outcomes.items()):
        say(f"{count:3} x {kind}, killed when {when}: {outcome}")
    assert daemon.terminate() == 0, daemon.log()
    host.assert_clean()
