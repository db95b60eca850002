"""Two sandboxes of one template at once: alike from inside, and closed to each other and the host.

These tests look at the host too (its addresses, listeners, a stand-in for the internet), so they
need root on the machine that runs the daemon, as conformance/run.sh has.
"""

import contextlib
import json
import os
import select
import shlex
import socket
import subprocess
import urllib.parse

import pytest
from conftest import SUPPORT

PUBLIC_ADDRESS = "93.184.216.34"
"""A public address; for one test a namespace of ours answers for it."""


@pytest.fixture(scope="module")
def pair(new_module_sandbox):
    """Two sandboxes, and what each one's very first command drew from its random sources."""
    draw = (
        "head -c16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; "
        "python3 -c 'import os, random, uuid; print(uuid.uuid4(), os.urandom(16).hex(), random.getrandbits(64))'; echo $RANDOM$RANDOM$RANDOM"
    )
    sandboxes = [new_module_sandbox(), new_module_sandbox()]
    return [(sandbox, sandbox.commands.run(draw).stdout) for sandbox in sandboxes]


@pytest.fixture(scope="module")
def first(pair):
    sandbox = pair[0][0]
    sandbox.files.write("/home/user/probe.py", (SUPPORT / "guest_probe.py").read_text())
    return sandbox


@pytest.fixture(scope="module")
def second(pair):
    """The neighbour, which serves its secret on port 8000."""
    sandbox = pair[1][0]
    sandbox.files.write("/home/user/www/secret.txt", "the neighbour's secret")
    handle = sandbox.commands.run("python3 -u -m http.server 8000 -d www --bind 0.0.0.0", background=True, timeout=0)
    for _ in handle:
        break
    return sandbox


def probe(sandbox, targets, seconds=4):
    out = sandbox.commands.run(f"python3 probe.py {seconds} {shlex.join(targets)}", timeout=60).stdout
    return json.loads(out)


def test_random_sources_differ_from_the_first_use(pair):
    (_, one), (_, two) = pair
    for a, b in zip(one.split(), two.split(), strict=True):
        if len(a) > 2:
            assert a != b, (one, two)
    assert one.splitlines()[0] != two.splitlines()[0]


def test_same_guest_address_and_different_files(pair):
    (one, _), (two, _) = pair
    for sandbox in (one, two):
        assert "169.254.0.21" in sandbox.commands.run("cat /proc/net/fib_trie").stdout
    one.files.write("/home/user/only-here", "one")
    one.commands.run("echo changed > /etc/motd && sync", user="root")
    assert not two.files.exists("/home/user/only-here")
    assert two.commands.run("cat /etc/motd 2>/dev/null || true").stdout != "changed\n"
    two.files.write("/home/user/only-here", "two")
    assert one.files.read("/home/user/only-here") == "one"


def test_processes_are_not_shared(pair):
    (one, _), (two, _) = pair
    handle = one.commands.run("sleep 987", background=True)
    assert "sleep 987" not in two.commands.run("ps -ef 2>/dev/null || cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    handle.kill()


def test_the_probe_itself_works(first):
    """Positive control: what is open inside is found, and what is closed is refused."""
    assert probe(first, ["tcp:127.0.0.1:49983", "tcp:127.0.0.1:1"]) == {
        "connected": ["tcp:127.0.0.1:49983"],
        "refused": ["tcp:127.0.0.1:1"],
    }


def host_addresses():
    out = subprocess.run(["ip", "-4", "-o", "addr", "show"], capture_output=True, text=True, check=True).stdout
    return sorted({line.split()[3].split("/")[0] for line in out.splitlines()} - {"127.0.0.1"})


def test_the_neighbour_is_out_of_reach(first, second, sandbox_url):
    """Its server is up for us (through the proxy), and for no address that the other could try."""
    import httpx

    headers = {"E2b-Sandbox-Id": second.sandbox_id, "E2b-Sandbox-Port": "8000"}
    assert httpx.get(f"{sandbox_url}/secret.txt", headers=headers).text == "the neighbour's secret"
    targets = [f"tcp:10.11.0.{n}:8000" for n in range(40)]
    targets += [f"tcp:10.12.0.{n}:8000" for n in range(80)]
    targets += ["tcp:169.254.0.20:8000", "tcp:169.254.0.22:8000"]
    assert probe(first, targets)["connected"] == []


def test_the_host_and_link_local_metadata_are_out_of_reach(first, sandbox_url):
    api = urllib.parse.urlsplit(os.environ["E2B_API_URL"])
    proxy = urllib.parse.urlsplit(sandbox_url)
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("0.0.0.0", 0), backlog=50))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("0.0.0.0", tcp.getsockname()[1]))
        port = tcp.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            tcp.accept()[0].close()  # the listener works
        addresses = host_addresses() + ["169.254.0.22", "169.254.0.20", "10.11.0.0", "10.12.0.0", "10.12.0.1", "10.12.0.2", "10.12.0.3"]
        targets = [f"tcp:{a}:{p}" for a in addresses for p in (port, api.port, proxy.port, 22)]
        targets += [f"udp:{a}:{port}" for a in addresses]
        targets += ["tcp:169.254.169.254:80", "tcp:169.254.170.2:80", "tcp:172.17.0.1:80", "tcp:192.168.0.1:80"]
        found = probe(first, sorted(set(targets)))
        arrived = select.select([tcp, udp], [], [], 0)[0]
    assert found["connected"] == []
    assert arrived == [], "a packet from the guest reached a listener of the host"


@contextlib.contextmanager
def stand_in_for_the_internet():
    """A namespace that answers for one public address with a TCP listener."""
    name, veth = "nidus-conf-inet", "nconf0"

    def ip(*args):
        subprocess.run(["ip", *args], check=True, capture_output=True)

    was_mounted = os.path.ismount("/run/netns")
    ip("netns", "add", name)
    try:
        ip("link", "add", veth, "type", "veth", "peer", "name", "inet0", "netns", name)
        ip("addr", "add", "198.51.100.1/30", "dev", veth)
        ip("link", "set", veth, "up")
        ip("-n", name, "addr", "add", "198.51.100.2/30", "dev", "inet0")
        ip("-n", name, "addr", "add", f"{PUBLIC_ADDRESS}/32", "dev", "inet0")
        ip("-n", name, "link", "set", "inet0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "route", "add", "default", "via", "198.51.100.1")
        ip("route", "add", f"{PUBLIC_ADDRESS}/32", "via", "198.51.100.2")
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, "python3", "-u", "-c",
             f"import socket; s = socket.create_server(('{PUBLIC_ADDRESS}', 8080)); print('up')\n"
             "while True:\n c, a = s.accept(); c.sendall(b'hello ' + a[0].encode()); c.close()"],
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout.readline() == b"up\n"
            yield
        finally:
            server.kill()
            server.wait()
    finally:
        subprocess.run(["ip", "link", "del", veth], capture_output=True)
        ip("netns", "del", name)
        if not was_mounted:
            subprocess.run(["umount", "/run/netns"], capture_output=True)


def test_the_internet_is_reached_through_the_hosts_address(first):
    with stand_in_for_the_internet():
        out = first.commands.run(
            f"python3 -c \"import socket; print(socket.create_connection(('{PUBLIC_ADDRESS}', 8080), 20).recv(99).decode())\"",
            timeout=40,
        ).stdout
    assert out == "hello 198.51.100.1\n", "the guest's packets carry the host's address outside"


def test_the_gateway_does_not_forward_to_the_host_by_another_route(first, second):
    """A guest that is root may add routes and addresses; the walls are outside of it."""
    first.commands.run(
        "ip route replace 10.0.0.0/8 via 169.254.0.22 2>/dev/null; ip addr add 10.11.0.99/32 dev eth0 2>/dev/null; true",
        user="root",
    )
    targets = [f"tcp:10.11.0.{n}:8000" for n in range(20)] + [f"tcp:{a}:22" for a in host_addresses()]
    assert probe(first, targets)["connected"] == []
