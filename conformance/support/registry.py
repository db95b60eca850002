"""A real registry (Debian's docker-registry) on loopback, and images made by hand: good ones and hostile ones."""

from __future__ import annotations

import base64
import crypt
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from .daemon import free_ports, wait_for

OCI = "application/vnd.oci.image"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layer:
    """The tar archive of a layer, entry by entry."""

    def __init__(self):
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **attributes) -> "Layer":
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        info.mode = attributes.pop("mode", 0o755 if kind == tarfile.DIRTYPE else 0o644)
        for key, value in attributes.items():
            setattr(info, key, value)
        self.tar.addfile(info, io.BytesIO(data))
        return self

    def directory(self, name: str, **attributes) -> "Layer":
        return self.add(name, kind=tarfile.DIRTYPE, **attributes)

    def link(self, name: str, target: str) -> "Layer":
        return self.add(name, kind=tarfile.SYMTYPE, linkname=target)

    def done(self) -> bytes:
        self.tar.close()
        return self.bytes.getvalue()


def system() -> bytes:
    """The smallest system that a sandbox can be of: busybox, bash, and nothing else, both static."""
    layer = Layer()
    for name in ("bin", "etc", "root", "usr/bin", "var/tmp", "tmp"):
        layer.directory(name, mode=0o1777 if name.endswith("tmp") else 0o755)
    layer.add("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
    layer.add("bin/bash", Path("/bin/bash-static").read_bytes(), mode=0o755)
    applets = subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet not in ("busybox", "bash"):
            layer.link(f"bin/{applet}", "busybox")
    layer.add("etc/passwd", b"root:x:0:0:root:/root:/bin/bash\n")
    layer.add("etc/group", b"root:x:0:\n")
    return layer.done()


class Registry:
    """A server on a directory; ends with the `with` block."""

    def __init__(self, root: Path, user: tuple[str, str] | None = None):
        [self.port] = free_ports(1)
        self.host = f"127.0.0.1:{self.port}"
        self.headers = {}
        auth = ""
        if user:
            # The registry takes bcrypt alone.
            password = crypt.crypt(user[1], crypt.mksalt(crypt.METHOD_BLOWFISH))
            (root / "htpasswd").write_text(f"{user[0]}:{password}\n")
            auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {root / 'htpasswd'}\n"
            self.headers["authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
        config = root / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {root / 'data'}}}\n"
            f"http: {{addr: '{self.host}'}}\n{auth}"
        )
        self.log = open(root / "log", "wb")
        self.process = subprocess.Popen(["docker-registry", "serve", config], stdout=self.log, stderr=self.log)
        wait_for("the registry to answer", self._answers, 30)

    def _answers(self) -> bool:
        try:
            self.call("GET", "/v2/")
        except urllib.error.HTTPError:
            return True
        except urllib.error.URLError:
            return False
        return True

    def call(self, method: str, path: str, data: bytes | None = None, **headers) -> urllib.response.addinfourl:
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        headers = self.headers | {k.replace("_", "-"): v for k, v in headers.items()}
        return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))

    def blob(self, name: str, data: bytes) -> str:
        where = self.call("POST", f"/v2/{name}/blobs/uploads/", b"").headers["location"]
        glue = "&" if "?" in where else "?"
        self.call("PUT", f"{where}{glue}digest={digest(data)}", data, content_type="application/octet-stream")
        return digest(data)

    def manifest(self, name: str, tag: str, document: dict) -> str:
        text = json.dumps(document).encode()
        self.call("PUT", f"/v2/{name}/manifests/{tag}", text, content_type=document["mediaType"])
        return digest(text)

    def image(
        self, name: str, layers: list[bytes], tag: str = "latest", compress=gzip.compress, config: dict | None = None, diff_ids: list[str] | None = None,
        architecture: str = "amd64",
    ) -> dict:
        """Pushes an image and answers its descriptor."""
        described = []
        for layer in layers:
            packed = compress(layer)
            described.append({"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": self.blob(name, packed), "size": len(packed)})
        about = {"architecture": architecture, "os": "linux", "config": config or {}, "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(l) for l in layers]}}
        text = json.dumps(about).encode()
        document = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": {"mediaType": f"{OCI}.config.v1+json", "digest": self.blob(name, text), "size": len(text)},
            "layers": described,
        }
        found = self.manifest(name, tag, document)
        size = len(json.dumps(document).encode())
        return {"mediaType": document["mediaType"], "digest": found, "size": size, "platform": {"os": "linux", "architecture": architecture}}

    def index(self, name: str, images: list[dict], tag: str = "latest") -> None:
        self.manifest(name, tag, {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": images})

    def env(self) -> dict[str, str]:
        """What a daemon needs to be told of it."""
        return {"NIDUS_REGISTRIES": f"{self.host}=plain_http+private,docker.io=mirror:{self.host}"}

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()
