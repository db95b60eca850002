"""Restores the snapshot with a QEMU started by hand, again and again, and times each phase.

Runs inside the namespace that has the tap. Reads a plan as JSON from standard input: the command
line, the state file, the QMP socket and how often. Writes a JSON list of {spawn, load, answer, total}
in seconds.
"""

import json
import os
import socket
import subprocess
import sys
import time

GUEST = ("169.254.0.21", 49983)
DEADLINE_SECONDS = 30


class Qmp:
    """Just enough of QEMU's monitor protocol."""

    def __init__(self, path: str, process: subprocess.Popen):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        self.file = self.socket.makefile("rwb")
        json.loads(self.file.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self):
        self.file.close()
        self.socket.close()


def first_answer() -> None:
    """Asks envd for /health until it answers."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with socket.create_connection(GUEST, timeout=0.5) as s:
                s.sendall(b"GET /health HTTP/1.1\r\nHost: envd\r\nConnection: close\r\n\r\n")
                if s.recv(64)[:10] in (b"HTTP/1.1 2", b"HTTP/1.0 2"):
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("the guest never answered on port 49983")


def restore(plan: dict) -> dict[str, float]:
    if os.path.exists(plan["qmp"]):
        os.unlink(plan["qmp"])
    began = time.perf_counter()
    process = subprocess.Popen(plan["args"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        qmp = Qmp(plan["qmp"], process)
        ready = time.perf_counter()
        qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        qmp.execute("migrate-incoming", uri=f"file:{plan['snapfile']}")
        while (status := qmp.execute("query-migrate").get("status")) != "completed":
            if status == "failed":
                raise RuntimeError("QEMU could not load the state")
            time.sleep(0.0005)
        qmp.execute("cont")
        running = time.perf_counter()
        first_answer()
        answered = time.perf_counter()
        qmp.close()
    except OSError as error:
        process.kill()
        raise RuntimeError(f"{error}: {process.stderr.read().decode(errors='replace')}") from error
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    return {"spawn": ready - began, "load": running - ready, "answer": answered - running, "total": answered - began}


def main() -> int:
    plan = json.load(sys.stdin)
    try:
        json.dump([restore(plan) for _ in range(plan["count"])], sys.stdout)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
