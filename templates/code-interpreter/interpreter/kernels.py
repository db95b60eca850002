"""What all kinds of kernels have in common."""

import asyncio
import os
import signal
import socket
import time

# Between two interrupts of a cell that goes on in spite of one, in seconds, and how many.
AGAIN, TIMES = 2, 10
# Seconds until a kernel that was started must answer.
STARTS = 120


class KernelError(Exception):
    """A kernel that cannot be made. Its text is for the user."""


class Kernel:
    """A process that runs cells, one at a time.

    `execute` yields dictionaries as `/execute` sends them: `stdout`, `stderr`, `result`, `error`,
    `number_of_executions`.
    """

    pid = None

    async def start(self):
        """Comes back when cells are taken."""
        raise NotImplementedError

    def execute(self, code, settings):
        """`settings`: `env` for good, `once` for this cell, `fresh` if the machine is another one,
        `rehearsal` if no trace of it is to stay."""
        raise NotImplementedError

    def interrupt(self):
        """Asks the running cell to end."""
        self.signal(signal.SIGINT)

    def signal(self, number):
        """To the process and those that it started."""
        if self.alive:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass

    async def close(self):
        """Ends the process."""
        raise NotImplementedError

    @property
    def alive(self):
        """Whether the process runs."""
        raise NotImplementedError


def said(kind, text):
    """`kind` is `stdout` or `stderr`; the time is in nanoseconds since 1970."""
    return {"type": kind, "text": text, "timestamp": time.time_ns()}


def died(how):
    """A cell whose kernel went away."""
    value = f"the kernel ended before the execution did ({how}); it starts anew, without its state"
    return {"type": "error", "name": "UnexpectedEndOfExecution", "value": value, "traceback": ""}


async def spawn_with_socket(words, prelude="", **options):
    """Starts a program that has one end of a pair of sockets as its descriptor 3, whatever that is here, in a process group
    of its own. `prelude` is what bash does before it becomes the program. Gives the process and our end."""
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        script = f'exec 3<&{number} {number}<&-; {prelude} exec "$@"'
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/bash", "-c", script, "kernel", *words, pass_fds=[number], start_new_session=True, **options
            )
        except OSError as e:
            ours.close()
            raise KernelError(f"{words[0]} does not start: {e}") from None
    return process, ours


async def until_it_ends(kernel, running):
    """Interrupts until the task `running`, which reads the cell's output to its end, has ended."""
    for _ in range(TIMES):
        kernel.interrupt()
        done, _ = await asyncio.wait([running], timeout=AGAIN)
        if done:
            return
    await asyncio.wait([running])
