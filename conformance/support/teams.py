"""Teams of their own for the tests of the SDK suites, made by `nidus team` beside the running daemon."""

import os
import subprocess
import uuid
from dataclasses import dataclass

import httpx
import pytest

from .daemon import BINARY, DEFAULT_DATA_DIR


def nidus(*args: str) -> str:
    """The output of a `nidus` command on the daemon's data directory."""
    env = {**os.environ, "NIDUS_DATA_DIR": str(DEFAULT_DATA_DIR), "NO_COLOR": "1"}
    done = subprocess.run([str(BINARY), *args], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass
class Team:
    id: str
    key: str
    token: str

    def client(self) -> httpx.Client:
        """REST with the team's key."""
        return httpx.Client(base_url=os.environ["E2B_API_URL"], headers={"X-API-Key": self.key}, timeout=60)

    def manager(self) -> httpx.Client:
        """REST with the team's access token."""
        return httpx.Client(base_url=os.environ["E2B_API_URL"], headers={"Authorization": f"Bearer {self.token}"}, timeout=60)


def of_our_daemon(name: str) -> str:
    """What `support.with_daemon` says of the daemon that it has started; without it the test is left out."""
    if not os.environ.get(name):
        pytest.skip("needs a daemon that the suite has started: run conformance/run.sh")
    return os.environ[name]


def new_team(max_sandboxes: int = 0) -> Team:
    of_our_daemon("NIDUS_TEST_ADMIN_TOKEN")
    team = nidus("team", "create", f"test-{uuid.uuid4().hex[:8]}", "--max-sandboxes", str(max_sandboxes))
    return Team(team, nidus("key", "create", "--team", team), nidus("team", "token", team))


def admin() -> httpx.Client:
    """REST with the admin token that the daemon was started with."""
    return httpx.Client(base_url=os.environ["E2B_API_URL"], headers={"X-Admin-Token": of_our_daemon("NIDUS_TEST_ADMIN_TOKEN")}, timeout=60)
