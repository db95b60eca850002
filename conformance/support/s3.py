"""A real S3 server (s3s-fs) on loopback, with a delay on each request and a count of what it sent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

from .daemon import REPO, wait_for

# `make conformance` builds it.
SERVER = Path(
    os.environ.get("NIDUS_S3_SERVER", REPO / "target/x86_64-unknown-linux-gnu/release/examples/s3_server")
)
BUCKET = "nidus"


class S3Server:
    """A server on a directory; ends with the `with` block."""

    def __init__(self, root: Path, latency_ms: int = 0):
        self.reports = tempfile.TemporaryFile()
        arguments = [SERVER, "--root", root, "--bucket", BUCKET, "--latency-ms", str(latency_ms)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=self.reports, text=True)
        line = self.process.stdout.readline()
        self.endpoint = line.split()[-1]

    def env(self, prefix: str = "builds") -> dict[str, str]:
        """What a daemon needs to keep its builds there."""
        return {
            "NIDUS_STORAGE": f"s3://{BUCKET}/{prefix}",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
        }

    def sent(self) -> int:
        """How many bytes it has sent so far."""
        before = len(self._counts())
        self.process.send_signal(signal.SIGUSR1)
        return wait_for("the server to say what it sent", lambda: self._counts()[before:], 10)[-1]

    def _counts(self) -> list[int]:
        self.reports.seek(0)
        return [int(n) for n in re.findall(rb"sent=(\d+)", self.reports.read())]

    def __enter__(self) -> "S3Server":
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
