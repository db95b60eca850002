"""Builds that nothing refers to are found and deleted, and nothing else is: `nidus gc`."""

import json
import uuid

import grpc
import pytest
from e2b import Sandbox
from support import sandboxes
from support.counting import count, count_beyond, counting
from support.daemon import DEFAULT_DATA_DIR, wait_for
from support.s3 import BUCKET, S3Server

STORAGE, CACHE, QUEUE = (DEFAULT_DATA_DIR / name for name in ("storage", "cache", "uploads"))


def builds():
    return {path.name for path in STORAGE.glob("*-*")}


def gc(daemon, *options):
    """What `nidus gc` reports, by build."""
    done = daemon.cli("--json", "gc", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["deleted"] == ("--delete" in options)
    assert report["diskBytes"] == sum(g["diskBytes"] for g in report["garbage"])
    return {g["buildID"]: g for g in report["garbage"]}


@pytest.fixture
def orphan(generated):
    """Makes builds that nothing refers to: checkpoints, taken on the node behind the API's back."""
    messages, services = generated

    def make(daemon):
        sandbox = sandboxes.create(daemon)
        sandbox.commands.run("head -c 3000000 /dev/urandom > /home/user/mine; sync")
        build = str(uuid.uuid4())
        with grpc.insecure_channel(daemon.node_addr) as channel:
            request = messages.SandboxCheckpointRequest(sandbox_id=sandbox.sandbox_id, build_id=build)
            services.SandboxServiceStub(channel).Checkpoint(request)
        assert build in builds()
        assert sandbox.kill(**sandboxes.options(daemon)) is True
        return build

    return make


def test_nothing_but_what_nothing_refers_to_is_deleted(daemon, orphan, host):
    gc(daemon, "--delete")
    before, mine = builds(), sandboxes.options(daemon)
    paused = counting(daemon)
    counted = count(paused)
    assert paused.pause(**mine) is True
    parent = sandboxes.create(daemon)
    kept, deleted = (parent.create_snapshot(**mine).snapshot_id for _ in range(2))
    (child,) = parent.fork(**mine)
    of_deleted = sandboxes.create(daemon, template=deleted)
    # Its build stays: a sandbox runs from it.
    assert Sandbox.delete_snapshot(deleted, **mine) is True
    build = orphan(daemon)
    there = builds()

    assert gc(daemon).keys() == {build}
    shown = daemon.cli("gc")
    assert build in shown.stdout and "nidus gc --delete" in shown.stdout, shown.stdout + shown.stderr
    assert builds() == there, "a dry run deletes nothing"
    # The file of 3 MB and the memory that it took.
    assert gc(daemon, "--delete")[build]["diskBytes"] > 3_000_000
    assert builds() == there - {build}
    assert gc(daemon, "--delete") == {}

    resumed = Sandbox.connect(paused.sandbox_id, timeout=300, **mine)
    count_beyond(resumed, counted)
    of_kept = sandboxes.create(daemon, template=kept)
    for one in (parent, child, of_deleted, of_kept):
        assert one.commands.run("echo here").stdout == "here\n"
    for one in (resumed, parent, child, of_deleted, of_kept):
        assert one.kill(**mine) is True
    assert Sandbox.delete_snapshot(kept, **mine) is True
    assert builds() == before and gc(daemon) == {}
    assert daemon.terminate() == 0
    host.assert_clean()


def test_it_works_without_a_daemon(daemon, orphan):
    gc(daemon, "--delete")
    paused = counting(daemon)
    counted, mine = count(paused), sandboxes.options(daemon)
    assert paused.pause(**mine) is True
    build = orphan(daemon)
    there = builds()
    assert daemon.terminate() == 0
    assert gc(daemon).keys() == {build} and builds() == there
    assert gc(daemon, "--delete").keys() == {build}
    assert builds() == there - {build} and gc(daemon) == {}
    daemon.start()
    resumed = Sandbox.connect(paused.sandbox_id, timeout=300, **mine)
    count_beyond(resumed, counted)
    assert resumed.kill(**mine) is True


def test_a_bucket_is_swept_of_what_is_ours_and_old(make_daemon, orphan, tmp_path):
    objects = tmp_path / "s3" / BUCKET / "builds"
    with S3Server(tmp_path / "s3") as s3:
        daemon = make_daemon(extra_env=s3.env()).start()
        daemon.create_key()
        try:
            gc(daemon, "--delete", "--grace", "0s")
            build = orphan(daemon)
            idle = "all builds to be uploaded"
            wait_for(idle, lambda: not list(QUEUE.iterdir()), 300, every=0.2)
            others = {path.name for path in (objects / "builds").iterdir()} - {build}
            assert others
            left = objects / "data" / str(uuid.uuid4()) / "upload"
            left.parent.mkdir()
            left.touch()
            assert gc(daemon) == {}, "all of this is young"

            (owner,) = (objects / "data" / build).glob("owner.*")
            owner.rename(owner.with_name(f"owner.{uuid.uuid4()}"))
            assert gc(daemon, "--grace", "0s").keys() == {left.parent.name}, "the build is another's"
            (stranger,) = (objects / "data" / build).glob("owner.*")
            stranger.rename(owner)

            report = gc(daemon, "--grace", "0s")
            assert report.keys() == {build, left.parent.name}
            assert report[build]["bucketBytes"] > 3_000_000
            assert (objects / "builds" / build).exists() and left.exists()
            gc(daemon, "--delete", "--grace", "0s")
            wait_for("the build to leave the bucket", lambda: not list(QUEUE.iterdir()), 60)
            assert {path.name for path in (objects / "builds").iterdir()} == others
            assert not left.exists() and not list((objects / "data").glob(f"{build}/*"))
            assert gc(daemon, "--grace", "0s") == {}
            assert daemon.terminate() == 0
        finally:
            daemon.end()
            for path in [*CACHE.rglob("*"), *QUEUE.iterdir()]:
                if path.is_file():
                    path.unlink()
