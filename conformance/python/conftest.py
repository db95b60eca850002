"""Fixtures of the Python SDK suite: it drives the daemon that E2B_API_URL and E2B_SANDBOX_URL name."""

import os
import uuid
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox
from support.daemon import TIME_FACTOR

SUPPORT = Path(__file__).resolve().parents[1] / "support"

# Long enough for any test under emulation; short enough that a lost sandbox soon ends by itself.
SANDBOX_SECONDS = int(600 * TIME_FACTOR)


pytest_plugins = ["support.methods"]

# httpx's own 5 s for a request are short on a loaded or emulated machine.
httpx._config.DEFAULT_TIMEOUT_CONFIG.__init__(60 * TIME_FACTOR)

# What `nidus env` prints.
VARIABLES = ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY", "E2B_VOLUME_API_URL")


def pytest_configure():
    for name in VARIABLES:
        if not os.environ.get(name):
            raise pytest.UsageError(f"{name} is not set: run conformance/run.sh, or `eval $(nidus env)`")
    extra = [n for n in os.environ if n.startswith("E2B_") and n not in VARIABLES]
    if extra:
        raise pytest.UsageError(f"only the variables of `nidus env` may be set, not {', '.join(extra)}")


def make_factory():
    made = []

    def create(**options):
        options.setdefault("timeout", SANDBOX_SECONDS)
        sandbox = Sandbox.create(**options)
        made.append(sandbox)
        return sandbox

    def clean():
        for sandbox in made:
            sandbox.kill()

    return create, clean


@pytest.fixture
def new_sandbox():
    """Makes sandboxes that are killed when the test ends."""
    create, clean = make_factory()
    yield create
    clean()


@pytest.fixture(scope="module")
def new_module_sandbox():
    """Makes sandboxes that are killed when the module ends."""
    create, clean = make_factory()
    yield create
    clean()


@pytest.fixture(scope="module")
def sbx(new_module_sandbox):
    """One sandbox for all tests of a module."""
    return new_module_sandbox(metadata={"suite": "python"}, envs={"GREETING": "hello", "PLACE": "base"})


@pytest.fixture
def folder(sbx):
    """A path in the sandbox that no other test uses."""
    return f"/home/user/t-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def api():
    """Raw REST with the key of the environment."""
    with httpx.Client(base_url=os.environ["E2B_API_URL"], headers={"X-API-Key": os.environ["E2B_API_KEY"]}, timeout=60 * TIME_FACTOR) as client:
        yield client


@pytest.fixture(scope="session")
def sandbox_url():
    return os.environ["E2B_SANDBOX_URL"]

