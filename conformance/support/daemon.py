"""Starts, watches and ends a real `nidus serve` for the tests and scripts.

Everything waits for a condition with a deadline; when a deadline passes the daemon's own log is
part of the error, so that a failing run explains itself.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("NIDUS_BIN", REPO / "target/release/nidus"))
DEFAULT_DATA_DIR = Path(os.environ.get("NIDUS_TEST_DATA_DIR", "/var/lib/nidus-test"))

# How much longer than on an idle machine anything may take (the test bed is emulated).
TIME_FACTOR = float(os.environ.get("NIDUS_TEST_TIME_FACTOR", "1"))

# Whether the daemon gets the NIDUS_ variables of our own environment (the test bed chooses drivers so).
INHERIT = os.environ.get("NIDUS_TEST_INHERIT") == "1"

# Building the base template (packages, cold boot under emulation) may be part of the first start.
FIRST_START_SECONDS = 15 * 60


def wait_for(what: str, condition, seconds: float, every: float = 0.05):
    """Asks `condition` until it answers something true, and returns that."""
    seconds *= TIME_FACTOR
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Daemon:
    """One `nidus serve` with its own data directory, ports and log file."""

    def __init__(
        self,
        data_dir: Path = DEFAULT_DATA_DIR,
        ports: list[int] | None = None,
        extra_env: dict[str, str] | None = None,
        log_path: Path | None = None,
    ):
        self.data_dir = Path(data_dir)
        self.api_port, self.proxy_port, self.node_port = ports or free_ports(3)
        self.extra_env = extra_env or {}
        self.log_path = log_path or Path(f"{self.data_dir}.log")
        self.process: subprocess.Popen | None = None
        self.key: str | None = None
        self.admin_token = secrets.token_hex(16)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def sandbox_url(self) -> str:
        return f"http://127.0.0.1:{self.proxy_port}"

    @property
    def node_addr(self) -> str:
        return f"127.0.0.1:{self.node_port}"

    def env(self) -> dict[str, str]:
        """The environment of the daemon and of every `nidus` command meant for it."""
        hidden = ("E2B_",) if INHERIT else ("E2B_", "NIDUS_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        env.update(
            NIDUS_DATA_DIR=str(self.data_dir),
            NIDUS_API_ADDR=f"127.0.0.1:{self.api_port}",
            NIDUS_PROXY_ADDR=f"127.0.0.1:{self.proxy_port}",
            NIDUS_NODE_ADDR=self.node_addr,
            NIDUS_ADMIN_TOKEN=self.admin_token,
            NO_COLOR="1",
        )
        env.update(self.extra_env)
        return env

    def sdk_env(self) -> dict[str, str]:
        """The variables that an SDK needs, and nothing else of ours."""
        return {
            "E2B_API_URL": self.api_url,
            "E2B_SANDBOX_URL": self.sandbox_url,
            "E2B_API_KEY": self.key or self.create_key(),
            "E2B_VOLUME_API_URL": self.api_url,
        }

    def spawn(self) -> subprocess.Popen:
        """Starts the process and returns at once."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [str(BINARY), "serve"],
                env=self.env(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.process

    def start(self, seconds: float = FIRST_START_SECONDS) -> "Daemon":
        """Starts the daemon and waits until it says that it can create sandboxes."""
        self.spawn()
        try:
            wait_for("GET /health to answer 204", self.healthy_or_dead, seconds)
        except Exception as error:
            log = self.log()
            self.end()
            raise RuntimeError(f"nidus serve did not come up: {error}\n{log}") from error
        return self

    def healthy_or_dead(self) -> bool:
        code = self.process.poll()
        if code is not None:
            raise RuntimeError(f"nidus serve ended with exit code {code}")
        return self.health() == 204

    def health(self) -> int | None:
        """The status of GET /health, or None when nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def log(self, last: int = 80) -> str:
        """The last lines that this start of the daemon wrote."""
        with open(self.log_path, "rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-last:])

    def terminate(self, seconds: float = 60) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill9(self) -> None:
        """SIGKILL to the daemon alone: what it started is left to itself."""
        self.process.kill()
        self.process.wait(30)

    def end(self) -> None:
        """Ends the daemon whatever its state (for clean-up)."""
        if self.process is None or self.process.poll() is not None:
            return
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self.kill9()
            raise

    def cli(self, *args: str, **options) -> subprocess.CompletedProcess:
        """Runs `nidus` with these arguments for this daemon."""
        options.setdefault("timeout", 120)
        env = {**self.env(), **options.pop("env", {})}
        return subprocess.run(
            [str(BINARY), *args], env=env, capture_output=True, text=True, **options
        )

    def create_key(self) -> str:
        """Makes an API key with the CLI and remembers it."""
        done = self.cli("key", "create")
        if done.returncode != 0:
            raise RuntimeError(f"nidus key create failed: {done.stderr}")
        self.key = done.stdout.strip()
        return self.key

    def clear(self) -> int:
        """Kills every sandbox that an interrupted run of the tests left paused; answers how many."""
        _, left = self.rest("GET", "/v2/sandboxes?state=running,paused&limit=100")
        for sandbox in left:
            self.rest("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
        return len(left)

    def rest(self, method: str, path: str, body=None, key: str | None = None):
        """One REST call: (status, decoded JSON or None). `key=""` sends none."""
        request = urllib.request.Request(f"{self.api_url}{path}", method=method)
        if body is not None:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            request.data = raw
            request.add_header("Content-Type", "application/json")
        key = self.key if key is None else key
        if key:
            request.add_header("X-API-Key", key)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        return status, json.loads(raw) if raw else None
