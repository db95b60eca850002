"""`mcp-gateway --config JSON` starts the gateway, and returns when all its servers answer; `mcp-gateway pull NAME...`
installs servers, for templates."""

import argparse
import asyncio
import json
import os
import secrets
import select
import signal
import subprocess
import sys
from pathlib import Path

from . import servers
from .servers import Failure

STATE = Path("/run/mcp-gateway")
TOKEN = Path("/etc/mcp-gateway/.token")
LOG = Path("/var/log/mcp-gateway.log")
READY_SECONDS = 180


def private(path: Path, text: str) -> None:
    """For root alone, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        f.write(text)
    draft.rename(path)


def stop_former() -> None:
    """One gateway at a time has the port."""
    try:
        pid = int((STATE / "pid").read_text())
        if b"gateway" in Path(f"/proc/{pid}/cmdline").read_bytes():
            handle = os.pidfd_open(pid)
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            select.select([handle], [], [], 10)
            os.close(handle)
    except (OSError, ValueError):
        pass


def start(text: str) -> None:
    try:
        config = json.loads(text)
    except ValueError as e:
        raise Failure(f"the configuration is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise Failure("the configuration is not an object of servers")
    for name, settings in config.items():
        servers.server(name, settings)
    for name, settings in config.items():
        servers.install(name, settings)
    stop_former()
    private(STATE / "config.json", json.dumps(config))
    # Another configuration without a token of its own has the one that clients know.
    former = TOKEN.read_text() if TOKEN.exists() else secrets.token_hex(16)
    private(TOKEN, os.environ.get("GATEWAY_ACCESS_TOKEN") or former)
    ready, said = os.pipe()
    with open(os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as log:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--ready", str(said)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[said], start_new_session=True)
    os.close(said)
    private(STATE / "pid", str(gateway.pid))
    with open(ready) as answer:
        # It ends with the gateway, if that says nothing.
        text = answer.read()
    if text != "ready":
        gateway.kill()
        raise Failure(text or f"the gateway ended; {LOG} has what it said:\n{LOG.read_text()[-2000:]}")
    servers.say(f"{len(config)} servers answer on port 50005")


async def serve(ready: int) -> None:
    from .http import listen
    from .hub import Hub
    from .pipes import RpcError

    config = json.loads((STATE / "config.json").read_text())
    hub = Hub([servers.server(name, settings) for name, settings in config.items()])
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    try:
        with open(ready, "w") as said:
            try:
                await asyncio.wait_for(hub.start(), READY_SECONDS)
                listen(hub, TOKEN.read_text())
                said.write("ready")
            except (RpcError, OSError, asyncio.TimeoutError) as e:
                said.write(str(e) or "the servers did not start in time")
                return
        await end.wait()
    finally:
        hub.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="mcp-gateway", description=__doc__)
    parser.add_argument("--config", help="servers and their settings, a JSON object")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("pull", help="install servers").add_argument("names", nargs="+")
    commands.add_parser("serve").add_argument("--ready", type=int, required=True)
    given = parser.parse_args()
    try:
        if given.command == "serve":
            asyncio.run(serve(given.ready))
        elif given.command == "pull":
            for name in given.names:
                servers.install(name, {})
        elif given.config is not None:
            start(given.config)
        else:
            parser.error("--config or pull is needed")
    except Failure as e:
        print(f"mcp-gateway: {e}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
