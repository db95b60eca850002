"""Kernels that are a program with pipes: its output is the cell's, and a socket says when the cell ended."""

import asyncio
import codecs
import json
import os
import secrets
import shlex
import signal
import tempfile

from .jupyter import how_it_ended
from .kernels import STARTS, Kernel, KernelError, died, said, spawn_with_socket
from .results import result

HERE = os.path.dirname(os.path.abspath(__file__))
CHUNK = 1 << 16


class Pipe:
    """One of the two pipes of output. At the end of a cell the program writes `mark` to both, behind all that it
    wrote before: so it is known when the cell's output is whole."""

    def __init__(self, kind, mark):
        self.kind, self.mark = kind, mark
        self.held = b""
        # Characters may be cut by the pipe.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data):
        """Events: pieces of text, and `{"mark"}`. What may be the beginning of a mark is held back."""
        *whole, rest = (self.held + data).split(self.mark)
        events = []
        for piece in whole:
            events += [self.text(piece, True), {"mark": self.kind}]
        keep = next((n for n in range(min(len(self.mark), len(rest)), 0, -1) if self.mark.startswith(rest[-n:])), 0)
        self.held = rest[len(rest) - keep :]
        events.append(self.text(rest[: len(rest) - keep], False))
        return [event for event in events if event]

    def text(self, data, end):
        text = self.decoder.decode(data, end)
        return said(self.kind, text) if text else None


class PipeKernel(Kernel):
    """The program says a line of JSON for each thing that is not output, on descriptor 3."""

    def __init__(self, cwd, env):
        self.cwd, self.env = cwd, env
        self.count = 0
        self.events = asyncio.Queue()
        self.process = None
        self.mark = f"\0{secrets.token_hex(8)}\0".encode()

    def command(self):
        """Program and arguments."""
        raise NotImplementedError

    # What bash does before it becomes the program.
    prelude = ""

    async def start(self):
        pipe = asyncio.subprocess.PIPE
        self.process, ours = await spawn_with_socket(
            self.command(), self.prelude, stdin=pipe, stdout=pipe, stderr=pipe, cwd=self.cwd, env={**os.environ, **self.env}
        )
        self.pid = self.process.pid
        self.reader, self.writer = await asyncio.open_connection(sock=ours, limit=1 << 28)
        pump = asyncio.ensure_future
        self.tasks = [
            pump(self.output("stdout", self.process.stdout)), pump(self.output("stderr", self.process.stderr)),
            pump(self.control()),
        ]
        pump(self.watch())
        self.greet()
        try:
            event = await asyncio.wait_for(self.events.get(), STARTS)
        except asyncio.TimeoutError:
            await self.close()
            raise KernelError(f"the kernel did not answer within {STARTS} seconds") from None
        if event is None or "ready" not in event:
            raise KernelError(f"the kernel ended when it started: {event and event.get('text', '').strip()}")

    def greet(self):
        """Makes a program say that it is ready that does not by itself."""

    async def output(self, kind, stream):
        pipe = Pipe(kind, self.mark)
        while data := await stream.read(CHUNK):
            for event in pipe.feed(data):
                self.events.put_nowait(event)

    async def control(self):
        while line := await self.reader.readline():
            self.events.put_nowait(json.loads(line))

    async def watch(self):
        self.ended = how_it_ended(await self.process.wait())
        await asyncio.wait(self.tasks, timeout=1)
        self.events.put_nowait(None)

    async def execute(self, code, settings):
        if not self.alive:
            yield died(self.ended)
            return
        self.count += not settings.get("rehearsal")
        yield {"type": "number_of_executions", "execution_count": self.count}
        # What came between two cells, of programs in the background, is shown with the next.
        await self.request(code, settings)
        waits, end = {"stdout", "stderr", "done"}, {}
        while waits:
            event = await self.events.get()
            if event is None:
                self.events.put_nowait(None)
                yield died(self.ended)
                return
            if "type" in event:
                yield event
            elif "bundle" in event:
                yield result(event["bundle"], event["main"])
            elif "mark" in event:
                waits.discard(event["mark"])
            elif "done" in event:
                waits.discard("done")
                end = event
        for message in self.closing(end):
            yield message

    def closing(self, event):
        """What a cell's end means."""
        error = event.get("error")
        return [{"type": "error", **error}] if error else []

    async def request(self, code, settings):
        """Gives the program a cell."""
        raise NotImplementedError

    @property
    def alive(self):
        return self.process is not None and self.process.returncode is None

    async def close(self):
        self.signal(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()
            self.writer.close()
            for task in self.tasks:
                task.cancel()


class Bash(PipeKernel):
    """A shell that keeps its variables, functions and directory."""

    def command(self):
        # Interactive: an interrupt ends the cell and not the shell.
        return ["bash", "--norc", "--noprofile", "--noediting", "-i"]

    # It complains of the terminal that it does not have. 5 and 6 stay the pipes whatever a cell does to 1 and 2.
    prelude = "exec 5>&1 6>&2 2>/dev/null;"

    def greet(self):
        self.write("PS1= PS2= PROMPT_COMMAND= HISTFILE=; set +m +H; exec 2>&6; echo '{\"ready\":true}' >&3\n")

    def write(self, text):
        self.process.stdin.write(text.encode())

    async def request(self, code, settings):
        before, after = [], []
        for name, value in settings.get("env", {}).items():
            before.append(f"export {name}={shlex.quote(value)}")
        for name, value in settings.get("once", {}).items():
            # Whether it was exported does not matter: what is here was given for all.
            before.append(f"__before_{name}=${{{name}-}} __had_{name}=${{{name}+1}}; export {name}={shlex.quote(value)}")
            after.append(
                f"if [ -n \"$__had_{name}\" ]; then export {name}=\"$__before_{name}\"; else unset {name}; fi;"
                f" unset __before_{name} __had_{name}"
            )
        with tempfile.NamedTemporaryFile("w", prefix="cell-", delete=False) as file:
            file.write(code + "\n")
        path = file.name
        # Lines of their own: an interrupt drops what is left of one.
        lines = [*before, f". {shlex.quote(path)} </dev/null 3>&- 5>&- 6>&-", "__status=$?", *after]
        mark = self.mark.decode().replace("\0", r"\x00")
        lines += [f"rm -f {shlex.quote(path)}", f"printf '{mark}' >&5", f"printf '{mark}' >&6"]
        lines += ["echo '{\"done\":'$__status'}' >&3", "(exit $__status)"]
        self.write("\n".join(lines) + "\n")
        await self.process.stdin.drain()

    def closing(self, event):
        status = event["done"]
        if status == 0:
            return []
        name = "KeyboardInterrupt" if status == 130 else "ExitStatus"
        return [{"type": "error", "name": name, "value": str(status), "traceback": f"exit status {status}"}]


class JavaScript(PipeKernel):
    """Node, with `typescript` for both languages (javascript.js)."""

    def __init__(self, language, cwd, env):
        super().__init__(cwd, env)
        self.language = language

    def command(self):
        return ["node", os.path.join(HERE, "javascript.js"), self.language, self.mark.decode().strip("\0")]

    async def request(self, code, settings):
        message = {"code": code, "count": self.count, "env": settings.get("env", {}), "once": settings.get("once", {})}
        self.writer.write(json.dumps(message).encode() + b"\n")
        await self.writer.drain()
