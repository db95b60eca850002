"""The demonstration behind scripts/demo.sh: one sandbox's whole life, each step timed."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from e2b import Sandbox
from support.daemon import Daemon, free_ports, wait_for
from support.with_daemon import start_and_show

DEFAULT_PORTS = [3000, 5007, 5008]
HOST_PORT = 8000

steps: list[tuple[str, float]] = []


@contextmanager
def timed(name: str):
    """Times a step for the table; a step that fails is not in it."""
    began = time.monotonic()
    yield
    steps.append((name, time.monotonic() - began))
    print(f"  {name}: {steps[-1][1] * 1000:.0f} ms")


def is_free(port: int) -> bool:
    import socket

    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


def show_life(daemon: Daemon) -> None:
    """Create, run, files, port, kill."""
    options = daemon.sdk_env()
    os.environ.update(options)  # all that the SDK is told

    with timed("create"):
        sandbox = Sandbox.create(envs={"WHO": "Nidus"}, metadata={"demo": "yes"}, timeout=300)
    try:
        with timed("first command"):
            hello = sandbox.commands.run("echo Hello from $WHO; uname -sr")
        print("    " + hello.stdout.strip().replace("\n", "\n    "))
        with timed("your Python"):
            python = sandbox.commands.run("python3 -c \"print('the first squares are', [n * n for n in range(8)])\"")
        print("    " + python.stdout.strip())

        text = "written from outside, read back again\n" * 1000
        with timed("file round trip"):
            sandbox.files.write("/home/user/note.txt", text)
            assert sandbox.files.read("/home/user/note.txt") == text

        server = sandbox.commands.run(f"python3 -u -m http.server {HOST_PORT}", background=True, timeout=0)
        next(iter(server))  # its first line: it listens
        url, host = daemon.sandbox_url + "/note.txt", sandbox.get_host(HOST_PORT)
        with timed("port round trip"):
            answer = httpx.get(url, headers={"Host": host}, timeout=30)
        assert answer.text == text
        print(f"    {len(text)} bytes from http://{host}/note.txt through the proxy")
    finally:
        with timed("kill"):
            killed = sandbox.kill()
    assert killed
    wait_for("the sandbox to be gone", lambda: not sandbox.is_running(), 10)


def table() -> None:
    width = max(len(name) for name, _ in steps)
    print(f"\n{'step':<{width}}  {'time':>9}")
    print(f"{'-' * width}  {'-' * 9}")
    for name, seconds in steps:
        print(f"{name:<{width}}  {seconds * 1000:6.0f} ms" if seconds < 60 else f"{name:<{width}}  {seconds:7.1f} s")
    print()


def main() -> int:
    data_dir = Path(os.environ["NIDUS_DATA_DIR"])
    running = Daemon(data_dir, ports=DEFAULT_PORTS)
    if running.health() == 204:
        print(f"a daemon already serves {running.api_url}: using it, and leaving it running")
        running.create_key()
        show_life(running)
        table()
        return 0

    ports = [port if is_free(port) else None for port in DEFAULT_PORTS]
    if None in ports:
        taken = ", ".join(str(p) for p in DEFAULT_PORTS if not is_free(p))
        ports = free_ports(3)
        print(f"port {taken} is taken by another program: using {ports[0]}, {ports[1]} and {ports[2]}")
    log_path = Path(os.environ.get("TMPDIR", "/tmp")) / f"demo-{os.getpid()}.log"
    daemon = Daemon(data_dir, ports=ports, log_path=log_path)
    print(f"starting nidus with {data_dir} (the first start builds the base template: some minutes)")
    try:
        steps.append(("daemon start", start_and_show(daemon)))
        show_life(daemon)
    except (Exception, KeyboardInterrupt) as error:
        print(f"demo: {error or type(error).__name__}", file=sys.stderr)
        if daemon.process is not None and daemon.process.poll() is None:
            print(f"the daemon's last words:\n{daemon.log(30)}", file=sys.stderr)
        return 1
    finally:
        began = time.monotonic()
        daemon.end()
        code = daemon.process.returncode if daemon.process else None
        steps.append(("daemon stop", time.monotonic() - began))
        log_path.unlink(missing_ok=True)
    if code != 0:
        print(f"demo: the daemon ended with exit code {code}", file=sys.stderr)
        return 1
    table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
