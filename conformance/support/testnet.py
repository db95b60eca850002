"""A small internet in a network namespace of this host: web servers, resolvers, a SOCKS5 proxy, private hosts.

Its hosts write down everything that reaches them, down to single packets, so that a test knows what got
through whatever the guest thinks it saw. See `testnet_hosts.py` for what runs in the namespace.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from .daemon import wait_for

NAMESPACE, VETH = "nidus-testnet", "ntest0"
HOST = "198.51.100.1"
GOOD, EVIL, DNS, FOREIGN_DNS, SOCKS, DEAD = (f"198.51.100.{n}" for n in (10, 20, 53, 54, 80, 81))
PRIVATE = ["192.168.77.2", "10.99.0.2", "172.30.0.2", "100.64.9.2", "169.254.169.254"]
PUBLIC_RESOLVER = "8.8.8.8"
"""What guests ask unless told otherwise; a host of the net answers for it, as a foreign resolver."""


def prepare(sandbox) -> None:
    """Gives a sandbox what `attempt` runs."""
    text = (Path(__file__).parent / "guest_attempts.py").read_text()
    sandbox.files.write("/root/attempt.py", text, user="root")


def attempt(sandbox, how: str, *args, wait: float = 10, **named) -> str:
    """What a guest saw that tried something, as root, and waited so long; see `guest_attempts.py`."""
    asked = json.dumps({"how": how, "args": args, "named": named, "wait": wait})
    return sandbox.commands.run(f"python3 /root/attempt.py {shlex.quote(asked)}", user="root", timeout=60).stdout.strip()


def run(*args: str, check: bool = True) -> None:
    done = subprocess.run(args, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr}")


class Net:
    """The net while it runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "arrived.jsonl"
        self.roots = folder / "ca.pem"

    def mark(self) -> int:
        return self.log.stat().st_size

    def since(self, mark: int) -> list[dict]:
        """What arrived after `mark`."""
        with open(self.log, "rb") as log:
            log.seek(mark)
            return [json.loads(line) for line in log.read().splitlines()]


def certificates(folder: Path) -> None:
    """An authority, and a certificate for each of the two web servers."""

    def openssl(*args: str) -> None:
        run("openssl", *args)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key = str(folder / "ca.pem"), str(folder / "ca.key")
    openssl("req", "-x509", *key, "-keyout", ca_key, "-out", ca, "-days", "30", "-subj", "/CN=test net",
            "-addext", "basicConstraints=critical,CA:TRUE")
    for name, names in (
        ("good", "DNS:good.test,DNS:a.wild.test,DNS:cname.test,DNS:api.good.test"),
        ("evil", "DNS:evil.test,DNS:proxy.test"),
    ):
        request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        openssl("req", *key, "-keyout", str(folder / f"{name}.key"), "-out", str(request), "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", str(request), "-CA", ca, "-CAkey", ca_key, "-CAcreateserial",
                "-days", "30", "-extfile", str(extensions), "-out", str(folder / f"{name}.pem"))


def remove() -> None:
    """Also what a killed run left."""
    run("ip", "link", "del", VETH, check=False)
    run("ip", "netns", "del", NAMESPACE, check=False)
    run("ip", "route", "del", f"{PUBLIC_RESOLVER}/32", check=False)


@contextmanager
def small_internet(folder: Path):
    """Makes the net; the host is a router of it, as of the real one."""
    remove()
    certificates(folder)
    net = Net(folder)
    net.log.touch()
    was_mounted = os.path.ismount("/run/netns")
    servers = None
    try:
        run("ip", "netns", "add", NAMESPACE)
        run("ip", "link", "add", VETH, "type", "veth", "peer", "name", "net0", "netns", NAMESPACE)
        run("ip", "addr", "add", f"{HOST}/24", "dev", VETH)
        run("ip", "link", "set", VETH, "up")
        inside = ("ip", "-n", NAMESPACE)
        for host in (GOOD, EVIL, DNS, FOREIGN_DNS, SOCKS, DEAD):
            run(*inside, "addr", "add", f"{host}/24", "dev", "net0")
        run(*inside, "link", "set", "net0", "up")
        run(*inside, "link", "set", "lo", "up")
        for host in (*PRIVATE, PUBLIC_RESOLVER):
            run(*inside, "addr", "add", f"{host}/32", "dev", "lo")
            run("ip", "route", "replace", f"{host}/32", "via", GOOD)
        run(*inside, "route", "add", "default", "via", HOST)
        servers = subprocess.Popen(
            ["ip", "netns", "exec", NAMESPACE, sys.executable, "-u", "-m", "support.testnet_hosts", str(folder)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1],
        )
        assert servers.stdout.readline() == "ready\n", "the hosts of the test net did not start"
        yield net
    finally:
        if servers is not None:
            servers.kill()
            servers.wait()
            servers.stdout.close()
        remove()
        for host in PRIVATE:
            run("ip", "route", "del", f"{host}/32", check=False)
        wait_for("the link of the test net to be gone", lambda: not Path(f"/sys/class/net/{VETH}").exists(), 10)
        if not was_mounted and os.path.ismount("/run/netns"):
            subprocess.run(["umount", "/run/netns"], check=False, capture_output=True)
