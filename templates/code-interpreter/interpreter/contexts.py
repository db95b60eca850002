"""Contexts: a kernel each, with a language and a directory, and what is known of the machine's environment."""

import asyncio
import json
import os
import uuid

import zmq.asyncio
from tornado.httpclient import AsyncHTTPClient, HTTPError

from . import jupyter, kernels, pipes

HOME = "/home/user" if os.path.isdir("/home/user") else os.getcwd()
ENVD = os.environ.get("INTERPRETER_ENVD", "http://127.0.0.1:49983")
# envd writes it for each sandbox anew.
ENVS = "/run/e2b/envs.json"
ALIASES = {"": "python", "py": "python", "python3": "python", "js": "javascript", "ts": "typescript", "sh": "bash"}
# What kernels find beside the environment of the server.
OWN = {"TERM": "dumb", "PYTHONUNBUFFERED": "1"}


# A header of requests that are none of a user's.
REHEARSAL = "X-Interpreter-Rehearsal"
REHEARSALS = {"python": "_x = 1\nprint(_x)\ndel _x\n{'a': 'b'}", "javascript": "console.log(0); 1"}


class Problem(Exception):
    """What a request has wrong, for who asked, with its HTTP status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Context:
    """One kernel under an id that stays when the kernel is another one."""

    def __init__(self, contexts, language, cwd):
        self.id = str(uuid.uuid4())
        self.contexts, self.language, self.cwd = contexts, language, cwd
        self.kernel = None
        self.lock = asyncio.Lock()
        self.removed = False
        # What the kernel was told: which machine it is on, that machine's variables, and those of the cell before.
        self.machine, self.env, self.told = None, {}, {}

    def described(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def start(self):
        """With another kernel, if there was one."""
        if not os.path.isdir(self.cwd):
            raise Problem(400, f"'{self.cwd}' is not a directory")
        if self.kernel is not None:
            await self.kernel.close()
        self.kernel = self.contexts.kernel(self.language, self.cwd)
        self.machine, self.env, self.told = None, {}, {}
        await self.kernel.start()

    def run(self, code, once, token, output, gone, rehearsal=False):
        """Runs a cell when those before it have ended; messages come out of `output`, None behind the last.
        When `gone` is set the cell is interrupted, or not begun. Gives the task that does it."""
        return asyncio.ensure_future(self._run(code, once, token, output, gone, rehearsal))

    async def _run(self, code, once, token, output, gone, rehearsal):
        try:
            async with self.lock:
                if self.removed:
                    raise Problem(404, "the context was removed")
                if gone.is_set():
                    return
                if not self.kernel.alive:
                    await self.start()
                if rehearsal:
                    # As the first cell of a machine.
                    self.contexts.known = self.machine = None
                settings = await self.settings(once, token)
                settings["rehearsal"] = rehearsal
                cell = asyncio.ensure_future(self.cell(code, settings, output))
                left = asyncio.ensure_future(gone.wait())
                try:
                    await asyncio.wait([cell, left], return_when=asyncio.FIRST_COMPLETED)
                    if not cell.done():
                        await kernels.until_it_ends(self.kernel, cell)
                    await cell
                finally:
                    left.cancel()
        except (kernels.KernelError, Problem) as e:
            output.put_nowait({"type": "error", "name": "KernelError", "value": str(e), "traceback": ""})
        finally:
            output.put_nowait(None)

    async def cell(self, code, settings, output):
        async for message in self.kernel.execute(code, settings):
            output.put_nowait(message)

    async def settings(self, once, token):
        """What the kernel is told beside the code."""
        machine, env = await self.contexts.environment(token)
        settings = {"once": once} if once else {}
        # Kernels that cannot undo are told what to go back to.
        settings["back"] = {n: env.get(n, "") for n in self.told if n not in once}
        self.told = once
        if machine != self.machine:
            settings["env"] = {n: v for n, v in env.items() if self.env.get(n) != v}
            settings["fresh"] = True
            self.machine, self.env = machine, env
        return settings

    async def restart(self):
        """Whatever runs ends with its kernel; what waits runs in the next."""
        await self.kernel.close()
        async with self.lock:
            await self.start()

    async def remove(self):
        """For good."""
        self.removed = True
        await self.kernel.close()


class Contexts:
    """All contexts. One of each language is the default, made when it is first asked for."""

    def __init__(self, directory, python):
        self.directory = directory
        self.zmq = zmq.asyncio.Context()
        self.zygote = jupyter.Zygote(python)
        self.contexts, self.defaults = {}, {}
        self.making = asyncio.Lock()
        self.known, self.made, self.rehearsed = None, None, False

    async def begin(self):
        """What is to be there from the start."""
        await asyncio.gather(*(self.default(language) for language in ("python", "javascript")))

    async def rehearse(self, port):
        """Runs a cell of each default context that is idle, as a client would: the next finds all that it needs in
        memory. Nothing of it stays."""
        for language, code in REHEARSALS.items():
            context = self.defaults.get(language)
            if context is None or context.lock.locked():
                continue
            body = json.dumps({"code": code, "language": language})
            headers = {REHEARSAL: "1"}
            url = f"http://127.0.0.1:{port}/execute"
            await AsyncHTTPClient().fetch(url, method="POST", headers=headers, body=body, request_timeout=120)
        self.rehearsed = True

    def kernel(self, language, cwd):
        """A kernel that was not started."""
        directory, env = self.directory, OWN
        if language == "python":
            return jupyter.ForkedKernel(self.zygote, self.zmq, directory, cwd, env)
        if language == "bash":
            return pipes.Bash(cwd, env)
        if language in ("javascript", "typescript"):
            return pipes.JavaScript(language, cwd, env)
        spec = jupyter.installed(language)
        if spec is None:
            raise Problem(400, f"no kernel for the language '{language}' is installed: there are python, javascript, typescript and bash")
        return jupyter.InstalledKernel(spec, self.zmq, directory, cwd, env)

    def all(self):
        return list(self.contexts.values())

    async def create(self, language, cwd):
        language = (language or "").strip().lower()
        context = Context(self, ALIASES.get(language, language), cwd or HOME)
        await context.start()
        self.contexts[context.id] = context
        return context

    async def default(self, language):
        language = (language or "").strip().lower()
        language = ALIASES.get(language, language)
        if language in self.defaults:
            return self.defaults[language]
        async with self.making:
            if language not in self.defaults:
                self.defaults[language] = await self.create(language, None)
            return self.defaults[language]

    async def find(self, key, language):
        return self.get(key) if key else await self.default(language)

    def get(self, key):
        # The name of the default one is an id as well.
        context = self.defaults.get("python") if key == "default" else self.contexts.get(key)
        if context is None:
            raise Problem(404, f"Context {key} not found")
        return context

    async def remove(self, key):
        context = self.get(key)
        del self.contexts[context.id]
        self.defaults = {n: c for n, c in self.defaults.items() if c is not context}
        await context.remove()

    async def restart(self, key):
        await self.get(key).restart()

    async def environment(self, token):
        """Which machine this is, and the variables that it was created with: envd knows."""
        try:
            made = os.stat(ENVS).st_mtime_ns
            if self.known is None or self.made != made:
                with open(ENVS) as file:
                    env = json.load(file)
                self.known, self.made = (env.get("E2B_SANDBOX_ID"), env), made
            return self.known
        except (OSError, ValueError):
            pass
        # An envd that writes no file.
        try:
            headers = {"X-Access-Token": token} if token else {}
            answer = await AsyncHTTPClient().fetch(f"{ENVD}/envs", headers=headers, request_timeout=5)
            env = {n: v for n, v in json.loads(answer.body).items() if isinstance(v, str)}
            self.known = (env.get("E2B_SANDBOX_ID"), env)
        except (HTTPError, OSError, ValueError, AttributeError) as e:
            # Who may not ask (the SDK sends its token with executions alone) has what was known before.
            if self.known is None:
                print(f"envd does not tell the environment: {e}", flush=True)
                return None, {}
        return self.known
