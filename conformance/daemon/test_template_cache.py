"""The template cache: what is in it, by ListCachedBuilds, before and after its time is over."""

import time

import grpc
import pytest
from e2b import Sandbox
from google.protobuf.empty_pb2 import Empty
from support import sandboxes
from support.daemon import wait_for

TTL = 4


@pytest.fixture
def cached(generated):
    """What a daemon's node has in its cache: build ids and until when they stay at least."""
    _, services = generated

    def cached(daemon):
        with grpc.insecure_channel(daemon.node_addr) as channel:
            builds = services.SandboxServiceStub(channel).ListCachedBuilds(Empty()).builds
        return {b.build_id: b.expiration_time.ToMilliseconds() / 1000 for b in builds}

    return cached


def newest_build(daemon, template):
    status, found = daemon.rest("GET", f"/templates/{template.partition(':')[0]}")
    assert status == 200, found
    return next(b["buildID"] for b in found["builds"] if b["status"] == "ready")


def test_a_template_is_closed_when_its_time_is_over_unless_it_is_used_or_pinned(make_daemon, cached, host):
    daemon = make_daemon(extra_env={"NIDUS_TEMPLATE_TTL_S": str(TTL), "NIDUS_WARM": "1"}).start()
    daemon.create_key()
    mine = sandboxes.options(daemon)
    base = newest_build(daemon, "base")
    wait_for("the base template to be pinned", lambda: base in cached(daemon), 30)
    parent = sandboxes.create(daemon)
    snapshot = parent.create_snapshot(**mine).snapshot_id
    build = newest_build(daemon, snapshot)
    assert build not in cached(daemon), "nobody used it yet"

    began = time.time()
    child = sandboxes.create(daemon, template=snapshot)
    first = cached(daemon)[build]
    assert began < first <= time.time() + TTL
    wait_for("its first time to be over", lambda: time.time() > first + 1, 2 * TTL)
    assert cached(daemon)[build] > first, "a sandbox uses it"
    assert child.commands.run("echo here").stdout == "here\n"
    assert child.kill(**mine) is True
    ended = time.time()
    wait_for("the template to be closed", lambda: build not in cached(daemon), 4 * TTL)
    assert time.time() > ended + TTL / 2, "it stays for some time"
    assert cached(daemon)[base] > time.time(), "what is pinned stays"
    # It is closed, not gone.
    again = sandboxes.create(daemon, template=snapshot)
    assert again.commands.run("echo again").stdout == "again\n"
    for one in (again, parent):
        assert one.kill(**mine) is True
    assert daemon.terminate() == 0

    pinned = {"NIDUS_TEMPLATE_TTL_S": str(TTL), "NIDUS_WARM": "1", "NIDUS_PINNED_TEMPLATES": snapshot}
    second = make_daemon(extra_env=pinned).start()
    second.key = daemon.key
    wait_for("the pinned snapshot to be open", lambda: build in cached(second), 30)
    wait_for("the base template to be closed", lambda: base not in cached(second), 4 * TTL)
    assert cached(second)[build] > time.time()
    assert Sandbox.delete_snapshot(snapshot, **sandboxes.options(second)) is True
    assert cached(second) == {}, "what is deleted is not open"
    assert second.terminate() == 0
    host.assert_clean()
