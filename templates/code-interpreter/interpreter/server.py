"""The server on port 49999: what the packages e2b-code-interpreter (Python and JavaScript) speak.

`POST /execute`, `POST|GET /contexts`, `DELETE /contexts/{id}`, `POST /contexts/{id}/restart`, `GET /health`.
"""

import asyncio
import json
import os
import re
import signal
import sys
import tempfile

import tornado.httpserver
import tornado.web

from .contexts import REHEARSAL, Contexts, Problem
from .kernels import KernelError

PORT = int(os.environ.get("INTERPRETER_PORT", "49999"))
# Seconds without output after which a line is sent that says nothing: connections stay open, and a client that
# went away is noticed.
KEEPALIVE = 5
MAX_BODY = 256 << 20
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Handler(tornado.web.RequestHandler):
    """Browsers may ask from anywhere; errors are plain text."""

    def initialize(self, contexts):
        self.contexts = contexts

    def set_default_headers(self):
        self.set_header("Server", "nidus-interpreter")
        for name in ("Origin", "Methods", "Headers"):
            self.set_header(f"Access-Control-Allow-{name}", "*")

    def options(self, *_):
        self.set_status(204)

    def write_error(self, status, exc_info=None, **_):
        error = exc_info[1] if exc_info else None
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        if isinstance(error, Problem):
            self.set_status(error.status)
            self.finish(str(error))
        elif isinstance(error, KernelError):
            self.set_status(500)
            self.finish(str(error))
        else:
            self.finish(getattr(error, "log_message", None) or self._reason)

    def log_exception(self, kind, value, trace):
        if not isinstance(value, (Problem, KernelError, tornado.web.HTTPError)):
            super().log_exception(kind, value, trace)

    def asked(self, **fields):
        """The body's fields, each of its type or left out."""
        try:
            body = json.loads(self.request.body or b"{}")
        except ValueError as e:
            raise Problem(400, f"the body is not JSON: {e}") from None
        if not isinstance(body, dict):
            raise Problem(400, "the body is not an object")
        values = {}
        for name, kind in fields.items():
            value = body.get(name)
            if value is not None and not isinstance(value, kind):
                raise Problem(422, f"'{name}' is not a {kind.__name__}")
            values[name] = value
        return values


class Health(Handler):
    async def get(self):
        if not self.contexts.rehearsed:
            raise Problem(503, "the first kernels are being made")
        if self.get_query_argument("rehearse", None):
            await self.contexts.rehearse(PORT)
        self.finish("OK")


class Execute(Handler):
    gone = None

    def on_connection_close(self):
        if self.gone is not None:
            self.gone.set()

    async def post(self):
        asked = self.asked(code=str, context_id=str, language=str, env_vars=dict)
        if asked["code"] is None:
            raise Problem(422, "'code' is missing")
        if asked["context_id"] and asked["language"]:
            raise Problem(400, "Only one of context_id or language can be provided")
        once = asked["env_vars"] or {}
        for name, value in once.items():
            if not NAME.match(name) or not isinstance(value, str) or "\0" in value:
                raise Problem(422, f"'{name}' is no environment variable with a text for a value")
        self.gone = asyncio.Event()
        context = await self.contexts.find(asked["context_id"], asked["language"])
        self.set_header("Content-Type", "application/json")
        output = asyncio.Queue()
        token = self.request.headers.get("X-Access-Token")
        rehearsal = REHEARSAL in self.request.headers
        running = context.run(asked["code"], once, token, output, self.gone, rehearsal)
        try:
            while True:
                try:
                    message = await asyncio.wait_for(output.get(), KEEPALIVE)
                except asyncio.TimeoutError:
                    message = {"type": "keepalive"}
                if message is None:
                    break
                lines = [message]
                while not output.empty() and lines[-1] is not None:
                    lines.append(output.get_nowait())
                ended = lines[-1] is None
                self.write("".join(json.dumps(line) + "\n" for line in lines if line is not None))
                if ended:
                    break
                await self.flush()
        except tornado.iostream.StreamClosedError:
            self.gone.set()
        await running


class ContextList(Handler):
    async def post(self):
        asked = self.asked(language=str, cwd=str)
        context = await self.contexts.create(asked["language"], asked["cwd"])
        self.finish(context.described())

    def get(self):
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps([c.described() for c in self.contexts.all()]))


class OneContext(Handler):
    async def delete(self, key):
        await self.contexts.remove(key)
        self.finish("null")


class Restart(Handler):
    async def post(self, key):
        await self.contexts.restart(key)
        self.finish("null")


async def main():
    # Kernels inherit it, and it may have been ignored where this was started.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="interpreter-") as directory:
        contexts = Contexts(directory, sys.executable)
        await contexts.begin()
        this = {"contexts": contexts}
        app = tornado.web.Application(
            [
                (r"/health", Health, this),
                (r"/execute", Execute, this),
                (r"/contexts", ContextList, this),
                (r"/contexts/([^/]+)", OneContext, this),
                (r"/contexts/([^/]+)/restart", Restart, this),
            ],
            log_function=lambda handler: None,
        )
        server = tornado.httpserver.HTTPServer(app, max_body_size=MAX_BODY, max_buffer_size=MAX_BODY, idle_connection_timeout=640)
        server.listen(PORT)
        print(f"listening on port {PORT}", flush=True)
        for _ in range(3):
            await contexts.rehearse(PORT)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
