"""The gateway's HTTP: MCP's Streamable HTTP without sessions, for who has the token."""

import asyncio
import hmac
import json

import tornado.httpserver
import tornado.web

from .hub import Hub
from .pipes import RpcError

PORT = 50005
MAX_BODY = 64 << 20
PARSE, INVALID, INTERNAL = -32700, -32600, -32603


def error(id, code: int, message: str) -> dict:
    return {"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}}


class Endpoint(tornado.web.RequestHandler):
    def initialize(self, hub: Hub, token: str):
        self.hub, self.token, self.work = hub, token, None

    def prepare(self):
        given = self.request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            self.set_header("WWW-Authenticate", "Bearer")
            self.set_status(401)
            self.finish(error(None, INVALID, "the gateway's access token is missing or wrong"))

    def write_error(self, status_code, **_):
        self.finish(error(None, INVALID, self._reason))

    async def post(self):
        try:
            body = json.loads(self.request.body)
        except ValueError:
            self.set_status(400)
            return self.finish(error(None, PARSE, "the body is not JSON"))
        messages = body if isinstance(body, list) else [body]
        if not messages or not all(isinstance(m, dict) for m in messages):
            self.set_status(400)
            return self.finish(error(None, INVALID, "not a message of JSON-RPC"))
        requests = [m for m in messages if "method" in m and "id" in m]
        if not requests:
            # Notifications, and answers to what we never ask.
            self.set_status(202)
            return self.finish()
        streams = any("progressToken" in (self.params(m).get("_meta") or {}) for m in requests)
        if streams and "text/event-stream" in self.request.headers.get("Accept", ""):
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("Cache-Control", "no-store")
            await self.do(self.stream(requests))
            return
        answers = await self.do(asyncio.gather(*(self.one(m, None) for m in requests)))
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(answers if isinstance(body, list) else answers[0]))

    async def do(self, work):
        """To its end, or until the client has gone."""
        self.work = asyncio.ensure_future(work)
        return await self.work

    def on_connection_close(self):
        if self.work:
            self.work.cancel()

    @staticmethod
    def params(message: dict) -> dict:
        params = message.get("params")
        return params if isinstance(params, dict) else {}

    async def stream(self, requests):
        events = asyncio.Queue()

        def progress(params):
            events.put_nowait({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

        async def answer(message):
            events.put_nowait(await self.one(message, progress))

        async def work():
            await asyncio.gather(*(answer(m) for m in requests))
            events.put_nowait(None)

        working = asyncio.ensure_future(work())
        try:
            while (event := await events.get()) is not None:
                self.write(f"event: message\ndata: {json.dumps(event)}\n\n")
                await self.flush()
        finally:
            working.cancel()
        self.finish()

    async def one(self, message: dict, on_progress) -> dict:
        id = message["id"]
        try:
            result = await self.hub.answer(message["method"], self.params(message), on_progress)
            return {"jsonrpc": "2.0", "id": id, "result": result}
        except RpcError as e:
            return {"jsonrpc": "2.0", "id": id, "error": e.error}
        except Exception as e:
            return error(id, INTERNAL, f"{type(e).__name__}: {e}")


def listen(hub: Hub, token: str) -> None:
    app = tornado.web.Application([(r"/mcp/?", Endpoint, {"hub": hub, "token": token})])
    tornado.httpserver.HTTPServer(app, max_body_size=MAX_BODY).listen(PORT)
