"""The template of the MCP gateway, built from the definition in the repo, and packages that its servers are installed from
where guests have no network."""

import hashlib
import subprocess
import sys
from pathlib import Path

from . import definitions, once

PINS = Path(__file__).with_name("mcp.txt")
PACKAGES = definitions.REPO / ".nidus" / "mcp"


def pip(*args) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def fill(draft: Path) -> None:
    # For the guest's Python, whatever this one is; ours must be able to use them too.
    pip("download", "--no-deps", "--only-binary", ":all:", "--python-version", "3.11", "-d", draft / "wheels", "-r", PINS)
    pip("install", "--no-deps", "--no-index", "--find-links", draft / "wheels", "--target", draft / "client", "-r", PINS)


def packages() -> Path:
    """A directory with `wheels` for guests and `client`, the official MCP client, for us; made once."""
    return once.made(PACKAGES, hashlib.sha256(PINS.read_bytes()).hexdigest()[:12], fill)


def template() -> None:
    """Builds it, or finds that nothing has changed."""
    definitions.build("mcp-gateway", "mcp-gateway")


if __name__ == "__main__":
    template()
