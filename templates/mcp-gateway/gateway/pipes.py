"""One MCP server that speaks over its standard input and output, a message a line."""

import asyncio
import itertools
import json
import os
import pwd

from .servers import Server, shown

PROTOCOL = "2025-06-18"
START_SECONDS = 60
LINE = 64 << 20
LOST = -32000
NO_METHOD = -32601


class RpcError(Exception):
    """An error as JSON-RPC has it."""

    def __init__(self, error: dict):
        super().__init__(error.get("message", "unknown error"))
        self.error = error


def lost(text: str) -> RpcError:
    return RpcError({"code": LOST, "message": text})


def as_user() -> dict:
    """Servers are not root's: what they make is the sandbox's user's."""
    try:
        user = pwd.getpwnam("user")
    except KeyError:
        return {}
    if os.geteuid() != 0:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": user.pw_dir}


class PipedServer:
    """Started when it is needed, and again after it has ended."""

    def __init__(self, server: Server):
        self.server = server
        self.capabilities = {}
        self.process = None
        self.waiting = {}
        self.progress = {}
        self.ids = itertools.count(1)
        self.starting = asyncio.Lock()
        self.reader = None

    @property
    def name(self) -> str:
        return self.server.name

    async def start(self) -> None:
        async with self.starting:
            if self.process and self.process.returncode is None:
                return
            how = as_user()
            home = {"HOME": how["cwd"], "USER": "user"} if how else {}
            if self.server.cwd:
                how["cwd"] = self.server.cwd
            env = {k: v for k, v in os.environ.items() if k not in ("GATEWAY_ACCESS_TOKEN", "PYTHONPATH")}
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *self.server.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    env=env | home | self.server.env, limit=LINE, start_new_session=True, **how)
            except OSError as e:
                raise lost(f"{self.name} cannot be started ({shown(self.server)}): {e}") from e
            self.reader = asyncio.ensure_future(self.read(self.process))
            about = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": {"name": "nidus-mcp-gateway", "version": "1"}}
            try:
                answer = await asyncio.wait_for(self.send("initialize", about), START_SECONDS)
            except asyncio.TimeoutError:
                self.kill()
                raise lost(f"{self.name} did not answer within {START_SECONDS} s ({shown(self.server)})") from None
            self.capabilities = answer.get("capabilities") or {}
            await self.write({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def read(self, process) -> None:
        try:
            while line := await process.stdout.readline():
                try:
                    message = json.loads(line)
                except ValueError:
                    # Some print a greeting.
                    continue
                if isinstance(message, dict):
                    await self.take(message)
        except (OSError, ValueError):
            # A line without an end: nothing after it can be understood.
            self.kill()
        await process.wait()
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(lost(f"{self.name} ended with exit code {process.returncode}"))
        self.waiting.clear()

    async def take(self, message: dict) -> None:
        if "method" in message:
            if "id" in message:
                # It asks us: we are there, and can do nothing for it.
                answer = {"jsonrpc": "2.0", "id": message["id"]}
                if message["method"] == "ping":
                    answer["result"] = {}
                else:
                    answer["error"] = {"code": NO_METHOD, "message": "the gateway does not serve this"}
                await self.write(answer)
            elif message["method"] == "notifications/progress":
                listener = self.progress.get((message.get("params") or {}).get("progressToken"))
                if listener:
                    listener(message["params"])
            return
        future = self.waiting.pop(message.get("id"), None)
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(RpcError(message["error"] if isinstance(message["error"], dict) else {}))
        else:
            future.set_result(message.get("result") or {})

    async def write(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            await self.process.stdin.drain()
        except OSError as e:
            raise lost(f"{self.name} ended: {e}") from e

    async def send(self, method: str, params: dict | None):
        id = next(self.ids)
        future = self.waiting[id] = asyncio.get_running_loop().create_future()
        message = {"jsonrpc": "2.0", "id": id, "method": method}
        if params is not None:
            message["params"] = params
        try:
            await self.write(message)
            return await future
        except asyncio.CancelledError:
            if self.process.returncode is None:
                await self.write({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}})
            raise
        finally:
            self.waiting.pop(id, None)

    async def call(self, method: str, params: dict | None = None, on_progress=None):
        """The result of a call; what it tells of its progress goes to `on_progress`."""
        await self.start()
        meta = (params or {}).get("_meta") or {}
        if on_progress is None or "progressToken" not in meta:
            return await self.send(method, params)
        # Two clients may have taken the same token.
        token, theirs = f"{self.name}-{next(self.ids)}", meta["progressToken"]
        self.progress[token] = lambda p: on_progress(p | {"progressToken": theirs})
        try:
            return await self.send(method, params | {"_meta": meta | {"progressToken": token}})
        finally:
            del self.progress[token]

    def kill(self) -> None:
        if self.process and self.process.returncode is None:
            try:
                os.killpg(self.process.pid, 9)
            except ProcessLookupError:
                pass
