"""The official SDK aimed at one given daemon, for tests that start daemons of their own."""

from __future__ import annotations

from e2b import Sandbox, Template

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


def build(daemon: Daemon, template, name: str) -> list[str]:
    """Builds a template; what was said."""
    lines = []
    Template.build(template, name, on_build_logs=lambda entry: lines.append(entry.message), **options(daemon))
    return lines


def delete_templates(daemon: Daemon, prefix: str) -> None:
    """Deletes the templates whose names begin so."""
    for template in call(daemon, "GET", "/templates"):
        if any(name.startswith(prefix) for name in template["names"]):
            call(daemon, "DELETE", f"/templates/{template['templateID']}")
