"""Templates of images from a real registry: good images in every form, and hostile ones."""

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest
from e2b import BuildException, Sandbox, Template
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, Daemon
from support.registry import Layer, Registry, digest, system

# The test bed's machine has none of Debian's package; everywhere else `make setup` installs it.
pytestmark = pytest.mark.skipif(
    os.environ.get("NIDUS_TESTBED") == "1" and not shutil.which("docker-registry"), reason="no docker-registry in the test bed's machine"
)

NAME = f"img-{uuid.uuid4().hex[:8]}"
# Google's registries take the file of a service account as a password.
ACCOUNT = {"private_key": "gcp-secret"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """One that wants a name and a password."""
    with Registry(tmp_path_factory.mktemp("closed"), user=("me", "secret")) as registry:
        yield registry


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """One that wants the key of a service account, as Google's do."""
    with Registry(tmp_path_factory.mktemp("google"), user=("_json_key", json.dumps(ACCOUNT))) as registry:
        yield registry


@pytest.fixture(scope="module")
def base():
    return system()


@pytest.fixture(scope="module")
def image_daemon(registry, closed, google, tmp_path_factory):
    private = ",".join(f"{r.host}=plain_http+private" for r in (closed, google))
    env = {"NIDUS_REGISTRIES": f"{registry.env()['NIDUS_REGISTRIES']},{private}"}
    daemon = Daemon(extra_env=env, log_path=tmp_path_factory.mktemp("daemon") / "nidus.log").start()
    daemon.create_key()
    yield daemon
    sandboxes.delete_templates(daemon, NAME)
    sandboxes.call(daemon, "POST", "/admin/layers/prune", {"maxBytes": 0})
    assert daemon.terminate() == 0


build = sandboxes.build


def image(registry, name, tag="latest"):
    return f"{registry.host}/{name}:{tag}"


def zstd(data):
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


def test_an_image_becomes_a_template(registry, base, image_daemon):
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    lower = (
        Layer()
        .directory("data", uid=1234, gid=4321, mode=0o750)
        .add("data/gone", b"gone")
        .add("data/kept", b"kept")
        .add("data/first", b"twice")
        .add("data/second", kind=tarfile.LNKTYPE, linkname="data/first")
        .directory("opaque")
        .add("opaque/old", b"old")
        .link("lib64", "usr/lib64")
        .directory("usr/lib64")
        .add("usr/bin/capable", b"x", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": capability.decode("latin-1")})
        .add("usr/bin/setuid", b"x", mode=0o4755)
        .add("opt/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        .done()
    )
    upper = Layer().add("data/.wh.gone").add("opaque/.wh..wh..opq").add("opaque/new", b"new").add("lib64/through", b"link").done()
    config = {"Env": ["PATH=/opt/bin:/usr/bin:/bin", "FROM_IMAGE=yes"]}
    mine = registry.image("good", [base, lower, upper], tag="amd64", compress=lambda d: gzip.compress(d) if d is not base else zstd(d), config=config)
    other = registry.image("good", [Layer().add("wrong", b"").done()], tag="arm64", architecture="arm64")
    registry.index("good", [other, mine])
    name = f"{NAME}-good"
    template = Template().from_image(image(registry, "good")).run_cmd("echo $FROM_IMAGE > /tmp/said")
    build(image_daemon, template, name)
    with Sandbox.create(name, timeout=300, **sandboxes.options(image_daemon)) as sandbox:
        run = lambda line: sandbox.commands.run(line, user="root").stdout.strip()  # noqa: E731
        assert run("cat /tmp/said; whoami; echo $FROM_IMAGE") == "yes\nroot\nyes"
        assert sandbox.commands.run("whoami; pwd; echo $PATH").stdout.split()[:2] == ["user", "/home/user"]
        assert run("ls /data /opaque") == "/data:\nfirst\nkept\nsecond\n\n/opaque:\nnew"
        assert run("stat -c '%u %g %a' /data") == "1234 4321 750"
        assert run("stat -c '%h %a' /data/first /usr/bin/setuid") == "2 644\n1 4755"
        assert run("cat /usr/lib64/through; readlink /lib64") == "linkusr/lib64"
        assert run("stat -c '%F %t %T' /opt/null") == "character special file 1 3"
        assert run("ls -d /wrong 2>/dev/null || echo none") == "none"
        assert run("echo x > /opt/null && cat /etc/hostname") == "nidus"
    lines = build(image_daemon, template, name)
    assert sum(line.startswith("CACHED") for line in lines) == 3, lines


def test_names_without_a_host_are_found_at_the_mirror(registry, base, image_daemon):
    registry.image("library/short", [base], tag="1")
    lines = build(image_daemon, Template().from_image("short:1"), f"{NAME}-short")
    assert any("docker.io/library/short:1" in line for line in lines), lines


def test_a_registry_with_a_password(closed, base, image_daemon):
    closed.image("closed", [base])
    name = f"{NAME}-closed"
    with pytest.raises(BuildException, match="refuses access"):
        build(image_daemon, Template().from_image(image(closed, "closed")), name)
    with pytest.raises(BuildException, match="refuses access"):
        build(image_daemon, Template().from_image(image(closed, "closed"), username="me", password="wrong"), name)
    build(image_daemon, Template().from_image(image(closed, "closed"), username="me", password="secret"), name)
    assert "secret" not in image_daemon.log(10_000)


def test_googles_and_amazons_keys(google, base, image_daemon):
    """Google's registries take the key of a service account as a password; Amazon's want a token that Amazon gives for a key."""
    google.image("private", [base])
    name = f"{NAME}-google"
    with pytest.raises(BuildException, match="refuses access"):
        build(image_daemon, Template().from_gcp_registry(image(google, "private"), {"private_key": "another"}), name)
    with pytest.raises(BuildException, match="has no private_key"):
        build(image_daemon, Template().from_gcp_registry(image(google, "private"), {"type": "service_account"}), name)
    build(image_daemon, Template().from_gcp_registry(image(google, "private"), ACCOUNT), name)
    amazon = Template().from_aws_registry("1234.dkr.ecr.eu-west-1.amazonaws.com/x:1", "AKIDEXAMPLE", "aws-secret", "eu-west-1")
    with pytest.raises(BuildException, match=r"api\.ecr\.eu-west-1\.amazonaws\.com"):
        build(image_daemon, amazon, name)
    assert "aws-secret" not in image_daemon.log(10_000) and "gcp-secret" not in image_daemon.log(10_000)


def hostile(registry, base):
    """Name, what is pushed, what is said."""
    long = Layer().add("x", b"", pax_headers={"comment": "x" * (2 << 20)}).done()
    many = Layer()
    for n in range(40):
        many.link(f"l{n}", f"l{(n + 1) % 40}")
    many.add("l0/file", b"")
    return [
        ("traversal", [Layer().add("../../../tmp/nidus-escaped", b"out").done()], {}, "leads out of the image"),
        ("dots", [Layer().add("a/../../b", b"out").done()], {}, "leads out of the image"),
        ("hard-link-out", [Layer().add("shadow", kind=tarfile.LNKTYPE, linkname="../../../etc/shadow").done()], {}, "leads out of the image"),
        ("hard-link-nowhere", [Layer().add("shadow", kind=tarfile.LNKTYPE, linkname="/etc/no-such-file").done()], {}, "not there"),
        ("loop", [many.done()], {}, "more than 40 links"),
        ("file-as-directory", [Layer().add("f", b"x").add("f/g", b"y").done()], {}, "no directory"),
        ("long-header", [long], {}, "a header of"),
        ("wrong-diff-id", [base], {"diff_ids": [digest(b"another")]}, "does not have the digest"),
        ("fewer-diff-ids", [base, base], {"diff_ids": [digest(base)]}, "more layers than its configuration"),
        ("no-tar", [b"this is no archive at all" * 100], {}, "cannot be read"),
        ("no-shell", [Layer().add("etc/passwd", b"root:x:0:0::/:/bin/sh\n").done()], {}, "no shell"),
        ("other-machine", [base], {"architecture": "riscv64"}, "linux/riscv64"),
    ]


def test_hostile_images_are_refused_and_nothing_is_written_outside(registry, base, image_daemon):
    for name, layers, options, said in hostile(registry, base):
        registry.image(name, layers, **options)
        with pytest.raises(BuildException, match=re.escape(said)) as failure:
            build(image_daemon, Template().from_image(image(registry, name)), f"{NAME}-bad")
        assert "\n" not in str(failure.value)[:10], name
    assert not Path("/tmp/nidus-escaped").exists()
    assert list((DEFAULT_DATA_DIR / "build").iterdir()) == []


def test_links_out_of_the_image_lead_into_it(registry, base, image_daemon, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    layer = Layer().link("abs", str(outside)).link("rel", "../../../../../../.." + str(outside))
    layer.directory(str(outside).lstrip("/")).add("abs/one", b"1").add("rel/two", b"2")
    registry.image("links", [base, layer.done()])
    build(image_daemon, Template().from_image(image(registry, "links")), f"{NAME}-links")
    assert list(outside.iterdir()) == []
    with Sandbox.create(f"{NAME}-links", timeout=300, **sandboxes.options(image_daemon)) as sandbox:
        assert sandbox.commands.run(f"cat {outside}/one /abs/two").stdout == "12"


def test_bombs_are_too_large(registry, base, image_daemon):
    # 5 GiB of zeros, in 5 MiB: more than twice the disk.
    piece = gzip.compress(bytes(64 << 20), 1)
    layer = Layer().add("small", b"x").done()
    packed = gzip.compress(layer) + piece * 80
    whole = {"diff_ids": [digest(b"whatever")]}
    registry.image("zeros", [layer], compress=lambda _: packed, **whole)
    with pytest.raises(BuildException, match="too large"):
        build(image_daemon, Template().from_image(image(registry, "zeros")), f"{NAME}-bad")
    # A file that says that it is larger than any disk.
    header = tarfile.TarInfo("big")
    header.size = 1 << 50
    registry.image("says", [header.tobuf(tarfile.GNU_FORMAT)])
    with pytest.raises(BuildException, match="too large"):
        build(image_daemon, Template().from_image(image(registry, "says")), f"{NAME}-bad")


def test_registries_that_may_not_be_asked(image_daemon):
    for name in ("127.0.0.1:1/x", "169.254.169.254/latest", "10.0.0.1:5000/x", "localhost:1/x", "[::1]:1/x"):
        with pytest.raises(BuildException, match="private address"):
            build(image_daemon, Template().from_image(name), f"{NAME}-bad")
