"""The official SDK aimed at one given daemon, for tests that start daemons of their own."""

from __future__ import annotations

from e2b import Sandbox

from .daemon import Daemon


def options(daemon: Daemon) -> dict[str, str]:
    """What an SDK call needs to reach this daemon."""
    env = daemon.sdk_env()
    return {"api_url": env["E2B_API_URL"], "sandbox_url": env["E2B_SANDBOX_URL"], "api_key": env["E2B_API_KEY"]}


def create(daemon: Daemon, **extra) -> Sandbox:
    """A new sandbox of the base template on this daemon."""
    extra.setdefault("timeout", 600)
    return Sandbox.create(**options(daemon), **extra)


def call(daemon: Daemon, method: str, path: str, body=None):
    """One REST call that must succeed; the decoded answer."""
    status, answer = daemon.rest(method, path, body)
    assert status < 400, (method, path, status, answer)
    return answer
