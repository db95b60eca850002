"""Kernels that speak Jupyter's protocol, over unix sockets.

Protocol: https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

import asyncio
import json
import os
import signal
import uuid

import zmq
import zmq.asyncio
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from jupyter_client.session import Session

from .kernels import STARTS, Kernel, KernelError, died, said, spawn_with_socket
from .results import result

# Seconds that a kernel has to end by itself.
ENDS = 2


class JupyterKernel(Kernel):
    """One kernel; subclasses say where its process comes from."""

    def __init__(self, context, directory, cwd, env):
        self.cwd, self.env = cwd, env
        self.base = os.path.join(directory, uuid.uuid4().hex[:12])
        self.key = uuid.uuid4().hex
        self.session = Session(key=self.key.encode(), username="nidus", check_pid=False)
        self.context = context
        self.queues = {}
        self.sockets, self.readers = [], []
        self.ended = None

    @property
    def connection_file(self):
        return self.base + ".json"

    async def start(self):
        connection = {
            "transport": "ipc", "ip": self.base, "key": self.key, "signature_scheme": "hmac-sha256",
            "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5,
        }
        with open(self.connection_file, "w", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            json.dump(connection, file)
        await self.spawn()
        self.shell = self.open(zmq.DEALER, 1)
        self.iopub = self.open(zmq.SUB, 2, subscribe=b"")
        self.control = self.open(zmq.DEALER, 4)
        for socket in (self.shell, self.iopub):
            self.readers.append(asyncio.ensure_future(self.read(socket)))
        try:
            await asyncio.wait_for(self.answers(), STARTS)
        except asyncio.TimeoutError:
            await self.close()
            raise KernelError(f"the kernel did not answer within {STARTS} seconds") from None

    async def spawn(self):
        """Sets `pid`; `gone` is called when the process has ended."""
        raise NotImplementedError

    def open(self, kind, port, subscribe=None):
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 0
        if subscribe is not None:
            socket.subscribe(subscribe)
        socket.connect(f"ipc://{self.base}-{port}")
        self.sockets.append(socket)
        return socket

    async def read(self, socket):
        while True:
            _, frames = self.session.feed_identities(await socket.recv_multipart())
            try:
                message = self.session.deserialize(frames)
            except (ValueError, TypeError) as e:
                print(f"a message of the kernel cannot be read: {e}", flush=True)
                continue
            queue = self.queues.get(message["parent_header"].get("msg_id"))
            if queue is not None:
                queue.put_nowait(message)

    async def send(self, kind, content, metadata=None, socket=None):
        """Gives the queue of the answers, and the id to drop it by."""
        message = self.session.msg(kind, content, metadata=metadata)
        key = message["header"]["msg_id"]
        queue = self.queues[key] = asyncio.Queue()
        await (socket or self.shell).send_multipart(self.session.serialize(message))
        return key, queue

    async def answers(self):
        """Asks until an answer comes on both sockets: a subscription takes its time."""
        while True:
            if self.ended is not None:
                raise KernelError(f"the kernel ended when it started ({self.ended})")
            key, queue = await self.send("kernel_info_request", {})
            seen = set()
            try:
                while not {"reply", "idle"} <= seen:
                    message = await asyncio.wait_for(queue.get(), 1)
                    if message is None:
                        break
                    if message["msg_type"] == "kernel_info_reply":
                        seen.add("reply")
                    elif message["content"].get("execution_state") == "idle":
                        seen.add("idle")
                else:
                    return
            except asyncio.TimeoutError:
                pass
            finally:
                self.queues.pop(key, None)

    async def execute(self, code, settings):
        content = {
            "code": self.prepared(code, settings), "silent": False, "store_history": True,
            "user_expressions": {}, "allow_stdin": False, "stop_on_error": False,
        }
        if self.ended is not None:
            yield died(self.ended)
            return
        key, queue = await self.send("execute_request", content, {"interpreter": settings})
        waits = {"reply", "idle"}
        try:
            while waits:
                message = await queue.get()
                if message is None:
                    yield died(self.ended)
                    return
                kind, content = message["msg_type"], message["content"]
                if kind == "execute_reply":
                    waits.discard("reply")
                elif kind == "status":
                    if content["execution_state"] == "idle":
                        waits.discard("idle")
                elif kind == "stream":
                    yield said(content["name"], content["text"])
                elif kind in ("display_data", "execute_result"):
                    yield result(content["data"], kind == "execute_result")
                elif kind == "error":
                    trace = "\n".join(content["traceback"])
                    yield {"type": "error", "name": content["ename"], "value": content["evalue"], "traceback": trace}
                elif kind == "execute_input":
                    yield {"type": "number_of_executions", "execution_count": content["execution_count"]}
        finally:
            self.queues.pop(key, None)

    def prepared(self, code, settings):
        """The code, with what the kernel does not know how to do by itself."""
        return code

    def gone(self, how):
        """The process ended."""
        self.ended = how
        for queue in self.queues.values():
            queue.put_nowait(None)

    @property
    def alive(self):
        return self.pid is not None and self.ended is None

    async def close(self):
        if self.alive and self.sockets:
            await self.send("shutdown_request", {"restart": False}, socket=self.control)
            for _ in range(ENDS * 20):
                if self.ended is not None:
                    break
                await asyncio.sleep(0.05)
        self.signal(signal.SIGKILL)
        for reader in self.readers:
            reader.cancel()
        for socket in self.sockets:
            socket.close()
        self.readers, self.sockets = [], []
        for name in (self.connection_file, *(f"{self.base}-{n}" for n in range(1, 6))):
            try:
                os.unlink(name)
            except FileNotFoundError:
                pass


class ForkedKernel(JupyterKernel):
    """Python, out of the zygote."""

    def __init__(self, zygote, *rest):
        super().__init__(*rest)
        self.zygote = zygote

    async def spawn(self):
        self.pid = await self.zygote.fork(self, {"connection": self.connection_file, "cwd": self.cwd, "env": self.env})


class InstalledKernel(JupyterKernel):
    """Any kernel that is installed with a kernel spec, as R's and Java's."""

    def __init__(self, spec, *rest):
        super().__init__(*rest)
        self.spec = spec
        self.set_env = ENVIRONMENT.get(spec.language.lower())

    async def spawn(self):
        words = [w.replace("{connection_file}", self.connection_file) for w in self.spec.argv]
        env = {**os.environ, **self.env, **self.spec.env}
        try:
            # It must not stay when this process is killed.
            words = ["setpriv", "--pdeathsig", "KILL", "--", *words]
            process = await asyncio.create_subprocess_exec(*words, cwd=self.cwd, env=env, start_new_session=True)
        except OSError as e:
            raise KernelError(f"the kernel of {self.spec.display_name} does not start: {e}") from None
        self.pid = process.pid
        asyncio.ensure_future(self.watch(process))

    async def watch(self, process):
        self.gone(how_it_ended(await process.wait()))

    def prepared(self, code, settings):
        """Variables as the language sets them; those for one cell are left afterwards as they are for all."""
        values = {**settings.get("env", {}), **settings.get("back", {}), **settings.get("once", {})}
        if not values or self.set_env is None:
            return code
        return self.set_env(values) + code


# How languages of installed kernels set variables.
ENVIRONMENT = {
    "r": lambda env: "".join(f"Sys.setenv({json.dumps(n)} = {json.dumps(v)})\n" for n, v in env.items()),
    "java": lambda env: "".join(f"System.setProperty({json.dumps(n)}, {json.dumps(v)});\n" for n, v in env.items()),
}


def installed(language):
    """The spec of an installed kernel that has this name or language."""
    manager = KernelSpecManager()
    wanted = language.lower()
    try:
        return manager.get_kernel_spec(wanted)
    except NoSuchKernel:
        pass
    for name in manager.find_kernel_specs():
        spec = manager.get_kernel_spec(name)
        if spec.language.lower() == wanted:
            return spec
    return None


def how_it_ended(code):
    """Of a return code as Python has it."""
    if code < 0:
        name = signal.Signals(-code).name if -code in iter(signal.Signals) else str(-code)
        return "no memory was left, or it was killed" if name == "SIGKILL" else f"signal {name}"
    return f"exit status {code}"


class Zygote:
    """The process that Python's kernels are forked from (zygote.py); started anew when it ends."""

    def __init__(self, python):
        self.python = python
        self.process = None
        self.kernels, self.asked = {}, {}
        self.lock = asyncio.Lock()

    async def ready(self):
        """Starts it, if it does not run."""
        async with self.lock:
            if self.process is not None and self.process.returncode is None:
                return
            words = [self.python, "-m", "interpreter.zygote"]
            self.process, ours = await spawn_with_socket(words, stdin=asyncio.subprocess.DEVNULL)
            self.reader, self.writer = await asyncio.open_connection(sock=ours)
            if not await self.reader.readline():
                raise KernelError("the process that Python's kernels come from does not start")
            asyncio.ensure_future(self.listen(self.reader, self.process))

    async def listen(self, reader, process):
        while line := await reader.readline():
            message = json.loads(line)
            if "ended" in message:
                kernel = self.kernels.pop(message["ended"], None)
                if kernel is not None:
                    kernel.gone(how_it_ended(os.waitstatus_to_exitcode(message["status"])))
            else:
                kernel, future = self.asked.pop(message["id"])
                self.kernels[message["pid"]] = kernel
                future.set_result(message["pid"])
        # Its kernels end with it.
        for kernel in self.kernels.values():
            kernel.gone("the process that it came from ended")
        for _, future in self.asked.values():
            future.set_exception(KernelError("the process that Python's kernels come from ended"))
        self.kernels, self.asked = {}, {}
        await process.wait()

    async def fork(self, kernel, request):
        await self.ready()
        key = uuid.uuid4().hex
        future = asyncio.get_running_loop().create_future()
        self.asked[key] = (kernel, future)
        self.writer.write(json.dumps({"id": key, **request}).encode() + b"\n")
        return await future
