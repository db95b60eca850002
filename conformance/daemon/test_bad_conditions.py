"""What the daemon says when it cannot: one clear sentence, an exit code, and nothing broken."""

import os
import re
import shutil
import socket
import subprocess
import threading

import pytest
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, TIME_FACTOR, wait_for

NOT_FOR_PEOPLE = re.compile(r"panicked|RUST_BACKTRACE|stack backtrace|\bSome\(|\bOk\(|\bErr\(|\bOs \{|Error \{")


def ends_with_one_sentence(daemon, seconds=60):
    """Starts a daemon that must give up, and returns the sentence that it gave up with."""
    process = daemon.spawn()
    code = process.wait(seconds)
    log = daemon.log()
    assert code not in (0, 101) and code > 0, f"exit code {code}\n{log}"
    assert not NOT_FOR_PEOPLE.search(log), log
    lines = [line for line in log.splitlines() if line.strip()]
    assert lines, "it said nothing"
    assert len(lines[-1]) < 400, "that is not one clear sentence"
    return lines[-1]


@pytest.mark.parametrize("which", ["api", "proxy", "node"])
def test_a_port_already_taken(make_daemon, host, which):
    daemon = make_daemon()
    port = getattr(daemon, f"{which}_port")
    with socket.create_server(("127.0.0.1", port)):
        sentence = ends_with_one_sentence(daemon)
    assert str(port) in sentence and "in use" in sentence.lower(), sentence
    host.assert_clean()


def test_a_second_daemon_on_the_same_data_directory(make_daemon):
    first = make_daemon().start()
    first.create_key()
    sandbox = sandboxes.create(first)
    second = make_daemon()
    sentence = ends_with_one_sentence(second)
    assert str(first.process.pid) in sentence and str(DEFAULT_DATA_DIR) in sentence, sentence
    assert sandbox.commands.run("echo unharmed").stdout == "unharmed\n"
    assert first.terminate() == 0


def path_without_qemu(folder):
    """A PATH with every program of this host but QEMU's."""
    folder.mkdir()
    for source in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        if not os.path.isdir(source):
            continue
        for name in os.listdir(source):
            if not name.startswith("qemu") and not (folder / name).exists():
                (folder / name).symlink_to(f"{source}/{name}")
    return str(folder)


@pytest.mark.skipif(os.environ.get("NIDUS_VMM") == "firecracker", reason="Firecracker needs no QEMU")
def test_qemu_is_missing(make_daemon, host, tmp_path):
    path = path_without_qemu(tmp_path / "bin")
    assert shutil.which("qemu-system-x86_64", path=path) is None
    daemon = make_daemon(extra_env={"PATH": path})
    sentence = ends_with_one_sentence(daemon)
    assert "qemu" in sentence.lower(), sentence
    assert re.search(r"install|apt|setup|doctor|not found|PATH", sentence), f"it should say what to do: {sentence}"
    host.assert_clean()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "256.1.1.1:80"])
def test_a_broken_address(make_daemon, address):
    daemon = make_daemon(extra_env={"NIDUS_API_ADDR": address})
    sentence = ends_with_one_sentence(daemon)
    assert address in sentence or "NIDUS_API_ADDR" in sentence or "api_addr" in sentence, sentence


def test_a_data_directory_that_cannot_be_made(make_daemon, tmp_path):
    (tmp_path / "file").write_text("in the way")
    daemon = make_daemon(data_dir=tmp_path / "file" / "data")
    sentence = ends_with_one_sentence(daemon)
    assert str(tmp_path / "file") in sentence, sentence


@pytest.fixture
def full_run_directory(tmp_path):
    """Mounts a small tmpfs where sandboxes write, so that it fills up and the rest of the disk does not."""
    run = DEFAULT_DATA_DIR / "run"
    run.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=0755", "nidus-conf", str(run)], check=True)
    yield run
    subprocess.run(["umount", "-l", str(run)], check=True)


def test_a_full_disk(make_daemon, full_run_directory, host):
    """A guest that fills the host's disk gets errors; the daemon lives and serves on."""
    daemon = make_daemon().start()
    daemon.create_key()
    greedy = sandboxes.create(daemon)
    # Written through to the disk: the overlay on the host cannot take 120 MB.
    done = greedy.commands.run(
        "dd if=/dev/urandom of=/root/big bs=1M count=120 conv=fsync 2>&1; echo code $?", user="root", timeout=120 * TIME_FACTOR
    )
    assert "code 0" not in done.stdout, done.stdout
    assert daemon.health() in (204, 503) and daemon.process.poll() is None, daemon.log()

    # Whatever a create answers now, it is a whole sandbox or an error with E2B's body.
    status, body = daemon.rest("POST", "/sandboxes", {"templateID": "base", "timeout": 60})
    if status == 201:
        assert daemon.rest("DELETE", f"/sandboxes/{body['sandboxID']}")[0] == 204
    else:
        assert status in (500, 503, 507) and body["code"] == status and body["message"].strip(), (status, body)

    assert greedy.kill(**sandboxes.options(daemon)) is True
    wait_for("the space to be free again", lambda: shutil.disk_usage(full_run_directory).free > 40 << 20, 20)
    wait_for("the daemon to be healthy", lambda: daemon.health() == 204, 60)
    assert sandboxes.create(daemon).commands.run("echo again").stdout == "again\n"
    assert daemon.terminate() == 0, daemon.log()
    host.assert_clean()


def test_a_disk_that_was_full_from_the_start(make_daemon, tmp_path):
    """No room for anything: the daemon says so and leaves nothing half-written."""
    place = tmp_path / "tiny"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "nidus-conf", str(place)], check=True)
    try:
        (place / "filler").write_bytes(b"x" * 200_000)
        daemon = make_daemon(data_dir=place / "data", log_path=tmp_path / "tiny.log")
        sentence = ends_with_one_sentence(daemon, seconds=300)
        assert re.search(r"no space|full", sentence, re.IGNORECASE), sentence
        assert not list(place.rglob("memfile")), "a build that is not whole must not be there"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_clients_that_go_away(daemon):
    """Connections that say nothing, half a request, or garbage do not disturb the others."""
    idle = []
    try:
        for port in (daemon.api_port, daemon.proxy_port, daemon.node_port):
            for greeting in (b"", b"GET /health HTT", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff"):
                s = socket.create_connection(("127.0.0.1", port))
                s.sendall(greeting)
                idle.append(s)
        assert daemon.health() == 204
        assert sandboxes.create(daemon).commands.run("echo fine").stdout == "fine\n"
    finally:
        for s in idle:
            s.close()
    assert daemon.terminate() == 0


def test_a_client_that_gives_up_during_create(daemon):
    """The sandbox of an abandoned request is not left running without an owner for ever."""
    body = b'{"templateID": "base", "timeout": 5}'
    request = (
        f"POST /sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {daemon.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    def abandon():
        with socket.create_connection(("127.0.0.1", daemon.api_port)) as s:
            s.sendall(request)

    threads = [threading.Thread(target=abandon) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for("no sandbox to be left", lambda: daemon.rest("GET", "/v2/sandboxes")[1] == [], 60, every=0.2)
    assert sandboxes.create(daemon).commands.run("echo fine").stdout == "fine\n"


def test_many_creates_at_once_all_work_or_fail_cleanly(daemon):
    """More requests at once than the pool has ready."""
    answers = []

    def create():
        answers.append(daemon.rest("POST", "/sandboxes", {"templateID": "base", "timeout": 60}))

    threads = [threading.Thread(target=create) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [body["sandboxID"] for status, body in answers if status == 201]
    for status, body in answers:
        assert status == 201 or (status in (429, 503) and body["code"] == status), (status, body)
    assert len(made) >= 8
    for sandbox_id in made:
        assert daemon.rest("DELETE", f"/sandboxes/{sandbox_id}")[0] == 204
    assert daemon.rest("GET", "/v2/sandboxes")[1] == []
