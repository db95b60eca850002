"""Builds in a real S3 server: a node that lost its disk resumes from the bucket, and fetches little."""

import contextlib
import importlib
import os
import random
import time
from collections import Counter

import grpc
import pytest
from e2b import Sandbox, SandboxException
from support import sandboxes
from support.counting import builds_of, count, count_beyond, counting, state
from support.daemon import DEFAULT_DATA_DIR, TIME_FACTOR, wait_for
from support.s3 import BUCKET, S3Server

ROUNDS = int(os.environ.get("NIDUS_TEST_ROUNDS", "2"))
SEED = int(os.environ.get("NIDUS_TEST_SEED") or random.randrange(1 << 32))

# Known bytes on the disk.
SUM = "sha256sum /home/user/known"
MAKE = f"head -c 2097152 /dev/urandom > /home/user/known; {SUM}"

STORAGE, CACHE, QUEUE = (DEFAULT_DATA_DIR / name for name in ("storage", "cache", "uploads"))


def remove(path):
    if path.is_dir():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lost_disk():
    """The data directory without its builds, what of them is yet to be uploaded, and what was cached of the object
    store."""
    away = {path: path.with_name(f"{path.name}-away") for path in (STORAGE, QUEUE)}
    for path, there in away.items():
        path.rename(there)
    remove(CACHE)
    try:
        yield
    finally:
        for path, there in away.items():
            remove(path)
            there.rename(path)


@pytest.fixture(autouse=True)
def no_cache_stays():
    yield
    remove(CACHE)
    remove(QUEUE)


def uploaded():
    return wait_for("all builds to be uploaded", lambda: not list(QUEUE.iterdir()), 300, every=0.2)


def test_a_node_without_its_disk_resumes_from_the_bucket(make_daemon, host, tmp_path):
    with S3Server(tmp_path / "s3") as s3:
        first = make_daemon(extra_env=s3.env()).start()
        first.create_key()
        sandbox = counting(first)
        before = count(sandbox)
        assert sandbox.pause(**sandboxes.options(first)) is True
        uploaded()
        assert first.terminate() == 0
    memfile = max(path.stat().st_size for path in STORAGE.glob("*/memfile"))
    # Compressed, and without what is zeros: the hardest of all measures.
    stored = sum(path.stat().st_size for path in (tmp_path / "s3").rglob("memfile.*"))

    # A distant bucket. No warm machines: they would fetch, too.
    with lost_disk(), S3Server(tmp_path / "s3", latency_ms=80) as s3:
        second = make_daemon(extra_env={**s3.env(), "NIDUS_WARM": "0"}).start()
        second.key = first.key
        mine = sandboxes.options(second)
        started, began = s3.sent(), time.monotonic()
        resumed = Sandbox.connect(sandbox.sandbox_id, timeout=300, **mine)
        assert resumed.commands.run("echo first", timeout=120).stdout == "first\n"
        took, fetched = time.monotonic() - began, s3.sent() - started
        print(f"{fetched >> 10} KiB in {took:.1f} s, of a memory of {memfile >> 10} KiB ({stored >> 10} KiB stored)")
        assert fetched < memfile / 3
        count_beyond(resumed, before)
        assert list(STORAGE.glob("*-*")) == [], "what is read from the bucket is not copied"
        assert resumed.kill(**mine) is True
        uploaded()
        assert second.terminate() == 0
    host.assert_clean()


def test_a_sandbox_without_memory_boots_from_the_bucket(make_daemon, host, tmp_path):
    with S3Server(tmp_path / "s3") as s3:
        first = make_daemon(extra_env=s3.env()).start()
        first.create_key()
        sandbox = sandboxes.create(first)
        sandbox.files.write("/home/user/note", "kept")
        assert sandbox.pause(mode="filesystem", **sandboxes.options(first)) is True
        uploaded()
        assert first.terminate() == 0
        with lost_disk():
            second = make_daemon(extra_env={**s3.env(), "NIDUS_WARM": "0"}).start()
            second.key = first.key
            mine, began = sandboxes.options(second), time.monotonic()
            resumed = Sandbox.connect(sandbox.sandbox_id, timeout=600, request_timeout=180, **mine)
            assert resumed.files.read("/home/user/note") == "kept"
            print(f"booted from the bucket in {time.monotonic() - began:.1f} s")
            # Its next pause is a build like any other.
            assert resumed.pause(**mine) is True
            resumed = Sandbox.connect(sandbox.sandbox_id, timeout=600, **mine)
            assert resumed.files.read("/home/user/note") == "kept"
            assert resumed.kill(**mine) is True
            uploaded()
            assert second.terminate() == 0
    # The node that killed it had lost this.
    for build in builds_of(sandbox.sandbox_id):
        remove(build)
    host.assert_clean()


def test_what_a_first_node_needed_is_stored_for_a_second(make_daemon, host, tmp_path):
    with S3Server(tmp_path / "s3") as s3:
        first = make_daemon(extra_env=s3.env()).start()
        uploaded()
        assert first.terminate() == 0

    def cold_start():
        """The order after a first sandbox on a node that has nothing, far from the bucket."""
        with lost_disk(), S3Server(tmp_path / "s3", latency_ms=80) as s3:
            node = make_daemon(extra_env={**s3.env(), "NIDUS_WARM": "0"}).start()
            node.create_key()
            began = time.monotonic()
            sandbox = sandboxes.create(node)
            assert sandbox.commands.run("echo first", timeout=120).stdout == "first\n"
            took, sent = time.monotonic() - began, s3.sent()
            assert sandbox.kill(**sandboxes.options(node)) is True
            order = wait_for("the order of reads to be stored", orders, 30)[0]
            print(f"{took:.1f} s, {sent >> 10} KiB, {order.stat().st_size // 4} frames of memory")
            assert node.terminate() == 0
            return order.read_bytes()

    def orders():
        return list((tmp_path / "s3").rglob("memfile.order"))

    assert orders() == [], "a node that has the build on its disk records nothing"
    # The second follows it and leaves it as it is.
    assert cold_start() == cold_start()
    host.assert_clean()


def test_a_killed_sandbox_is_removed_from_the_bucket(make_daemon, host, tmp_path):
    manifests = tmp_path / "s3" / BUCKET / "builds/builds"
    with S3Server(tmp_path / "s3") as s3:
        daemon = make_daemon(extra_env=s3.env()).start()
        daemon.create_key()
        uploaded()
        templates = set(manifests.iterdir())
        assert templates
        sandbox = sandboxes.create(daemon)
        assert sandbox.pause(**sandboxes.options(daemon)) is True
        uploaded()
        (paused,) = set(manifests.iterdir()) - templates
        data = tmp_path / "s3" / BUCKET / "builds/data" / paused.name
        assert any(data.iterdir())
        assert sandbox.kill(**sandboxes.options(daemon)) is True
        wait_for("the paused sandbox to leave the bucket", lambda: not paused.exists(), 60)
        uploaded()
        assert not data.exists() or not any(data.iterdir())
        assert set(manifests.iterdir()) == templates
        assert daemon.terminate() == 0
    host.assert_clean()


@pytest.mark.timeout((240 + 20 * ROUNDS) * TIME_FACTOR)
def test_kill_9_in_uploads(make_daemon, host, tmp_path, capsys):
    """Killed at random moments of an upload, a daemon uploads the rest when it is back. What a node without the build
    finds in the bucket meanwhile is all of it or nothing."""
    chance = random.Random(SEED)
    bucket, paused, found = tmp_path / "s3", [], Counter()
    manifests = bucket / BUCKET / "builds/builds"

    def start(s3, key=None):
        daemon = make_daemon(extra_env={**s3.env(), "NIDUS_WARM": "0"}).start()
        daemon.key = key or daemon.create_key()
        return daemon

    def pause_one(daemon):
        sandbox = counting(daemon)
        known = sandbox.commands.run(MAKE).stdout
        seen = state(sandbox)
        assert sandbox.pause(**sandboxes.options(daemon)) is True
        paused.append((sandbox.sandbox_id, seen, known))
        return builds_of(sandbox.sandbox_id).pop().name

    def goes_on(daemon, sandbox_id, seen, known):
        resumed = Sandbox.connect(sandbox_id, timeout=300, **sandboxes.options(daemon))
        now = state(resumed)
        assert now[0] >= seen[0] and now[1:] == seen[1:]
        count_beyond(resumed, now[0])
        assert resumed.commands.run(SUM).stdout == known
        return resumed

    # Some of the time of each upload is the bucket's, so that a moment may be between any two requests.
    with S3Server(bucket, latency_ms=20) as s3:
        daemon = start(s3)
        uploaded()
        pause_one(daemon)
        began = time.monotonic()
        uploaded()
        whole = time.monotonic() - began
        for n in range(ROUNDS):
            build = pause_one(daemon)
            time.sleep(whole * (n + chance.random()) / ROUNDS)  # the moment that is tried
            daemon.kill9()
            there = (manifests / build).exists()
            found["whole" if there else "not there"] += 1
            with lost_disk():
                other = start(s3, daemon.key)
                if there:
                    goes_on(other, *paused[-1])
                else:
                    with pytest.raises(SandboxException):
                        goes_on(other, *paused[-1])
                other.kill9()
            daemon = start(s3, daemon.key)
            uploaded()
            assert (manifests / build).exists()
        assert daemon.terminate() == 0
    with capsys.disabled():
        print(f"\nNIDUS_TEST_SEED={SEED}; an upload takes {1000 * whole:.0f} ms; when it was killed: {dict(found)}")
    with lost_disk(), S3Server(bucket) as s3:
        daemon = start(s3, daemon.key)
        for one in paused:
            assert goes_on(daemon, *one).kill(**sandboxes.options(daemon)) is True
        uploaded()
        assert daemon.terminate() == 0
    host.assert_clean()


def test_another_node_is_sent_to_the_store_once_a_build_is_there(make_daemon, generated, host, tmp_path):
    messages, services = (importlib.import_module(name) for name in ("chunks_pb2", "chunks_pb2_grpc"))
    build = min(STORAGE.glob("*-*"), key=lambda path: (path / "metadata.json").stat().st_mtime).name
    daemon = make_daemon(extra_env={"NIDUS_STORAGE": f"file://{tmp_path}/store"}).start()
    with grpc.insecure_channel(daemon.node_addr) as channel:
        stub = services.ChunkServiceStub(channel)

        def use_storage():
            answer = stub.GetBuildFileSize(messages.GetBuildFileSizeRequest(build_id=build, name="memfile"))
            # At any time there is one place to read it from.
            assert not answer.availability.not_available
            assert answer.availability.use_storage == (answer.total_size == 0)
            return answer.availability.use_storage

        wait_for("the build to be uploaded", use_storage, 300)
        assert (tmp_path / "store/builds" / build).exists()
        request = messages.ReadAtBuildSeekableRequest(build_id=build, name="memfile", length=4096)
        (answer,) = stub.ReadAtBuildSeekable(request)
        assert answer.availability.use_storage and not answer.data
        (answer,) = stub.GetBuildBlob(messages.GetBuildBlobRequest(build_id=build, name="snapfile"))
        assert answer.availability.use_storage and not answer.data
    assert daemon.terminate() == 0
    host.assert_clean()


def test_an_object_store_that_cannot_be_used_is_one_sentence(make_daemon, tmp_path):
    with S3Server(tmp_path / "s3") as s3:
        for wrong, says in [
            ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "Check the keys"),
            ({"NIDUS_STORAGE": "s3://nowhere/builds"}, "does not exist"),
            ({"NIDUS_STORAGE": "http://127.0.0.1/"}, "file, s3 and gs are known"),
            ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Check the endpoint"),
        ]:
            daemon = make_daemon(extra_env={**s3.env(), **wrong})
            daemon.spawn()
            assert daemon.process.wait(60) != 0
            assert says in daemon.log(), daemon.log()
