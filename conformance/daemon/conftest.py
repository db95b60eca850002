"""Fixtures of the daemon suite: every test starts and ends its own `nidus serve`.

One data directory (NIDUS_TEST_DATA_DIR, default /var/lib/nidus-test) holds the base template, which
is built once; one daemon at a time runs on it.
"""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
from grpc_tools import protoc
from support.daemon import DEFAULT_DATA_DIR, REPO, Daemon
from support.testnet import DNS, small_internet

pytest_plugins = ["support.methods"]

PROTO = REPO / "crates/proto/proto"
LEAKCHECK = REPO / "scripts/leakcheck.sh"


class Host:
    """What was on the host before a test, and what is there beyond it."""

    def __init__(self, snapshot: Path):
        self.snapshot = snapshot
        self.run("snapshot")

    def run(self, verb, grace="5"):
        return subprocess.run(
            [str(LEAKCHECK), verb, str(self.snapshot)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "NIDUS_DATA_DIR": str(DEFAULT_DATA_DIR), "LEAK_GRACE": grace},
            capture_output=True,
            text=True,
        )

    def added(self) -> list[str]:
        """Lines `kind<TAB>what` of what is there now and was not there then."""
        out = self.run("compare", grace="0").stdout
        return [line.strip() for line in out.splitlines() if "\t" in line]

    def assert_clean(self):
        done = self.run("compare", grace="10")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory):
    """What an interrupted run left in the data directory is no part of this one."""
    daemon = Daemon(log_path=tmp_path_factory.mktemp("first") / "nidus.log").start()
    try:
        daemon.create_key()
        daemon.clear()
    finally:
        daemon.end()


@pytest.fixture
def host(tmp_path):
    """The host before the test; the test is responsible for asking `assert_clean`."""
    return Host(tmp_path / "host-before")


@pytest.fixture
def make_daemon(tmp_path):
    """Makes daemons (not yet started) that are ended when the test ends."""
    made = []

    def make(**options):
        options.setdefault("log_path", tmp_path / f"nidus-{len(made)}.log")
        daemon = Daemon(**options)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.end()


@pytest.fixture
def daemon(make_daemon):
    """A daemon that runs, with a key."""
    daemon = make_daemon().start()
    daemon.create_key()
    return daemon


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory):
    """One running daemon, with a key, for the tests of a module that do not end it."""
    daemon = Daemon(log_path=tmp_path_factory.mktemp("daemon") / "nidus.log").start()
    try:
        daemon.create_key()
        yield daemon
    finally:
        daemon.end()


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """Python modules made from the .proto files that the daemon is built from."""
    out = tmp_path_factory.mktemp("proto")
    include = importlib.resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", f"--python_out={out}", f"--grpc_python_out={out}", "orchestrator.proto", "info.proto", "template-manager.proto", "chunks.proto"])
    assert code == 0
    sys.path.insert(0, str(out))
    try:
        yield importlib.import_module("orchestrator_pb2"), importlib.import_module("orchestrator_pb2_grpc")
    finally:
        sys.path.remove(str(out))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A small internet that writes down what reaches it."""
    with small_internet(tmp_path_factory.mktemp("net")) as net:
        yield net


@pytest.fixture(scope="module")
def net_daemon(net, tmp_path_factory):
    """A daemon in it, for all tests of a module."""
    extra = {"NIDUS_DNS": DNS, "NIDUS_EGRESS_ROOTS": str(net.roots)}
    daemon = Daemon(extra_env=extra, log_path=tmp_path_factory.mktemp("daemon") / "nidus.log").start()
    daemon.create_key()
    yield daemon
    assert daemon.terminate() == 0
