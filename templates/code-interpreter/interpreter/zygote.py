"""A process that has everything imported and makes Python kernels by forking.

A kernel that begins with `import pandas` is seconds late; one that is forked is there at once, and all of
them share the memory of what they have not changed. This process must stay single-threaded and open no
ZeroMQ context: neither survives a fork.

It reads lines of JSON from file descriptor 3, a socket, and answers there:
`{"id", "connection", "cwd", "env"}` is answered with `{"id", "pid"}`, and a kernel that ended is told as
`{"ended", "status"}` (its process id, and what wait(2) says). When the socket closes, all kernels end.
"""

import ctypes
import gc
import json
import os
import selectors
import signal
import site
import socket
import sys
import traceback

MIB = 1 << 20
# prctl(2)
PR_SET_PDEATHSIG = 1


def warm():
    """What users mostly import, and the slow things that a first use of it does."""
    import matplotlib

    import matplotlib.pyplot as plt
    import numpy
    import pandas

    from . import kernel  # noqa: F401

    # Fonts are listed once, by the first figure; the formatters of frames and figures are compiled.
    pandas.DataFrame({"a": numpy.arange(3.0)})._repr_html_()
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], label="x")
    axes.set_title("x")
    from IPython.core.pylabtools import print_figure

    print_figure(figure)
    plt.close("all")
    matplotlib.rcdefaults()


def installed():
    """When something was last installed or removed where Python finds it."""
    times = []
    for path in (*sys.path, site.getusersitepackages()):
        try:
            times.append((path, os.stat(path).st_mtime_ns))
        except OSError:
            pass
    return times


def child(request, unchanged):
    """The kernel itself; does not come back."""
    status = 1
    try:
        # Also when the zygote is killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for name in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if not unchanged:
            # What is imported here may be of another version than what is there now.
            os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            os.execv(sys.executable, [sys.executable, "-m", "interpreter.kernel", request["connection"]])
        from . import kernel

        kernel.run(request["connection"])
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    control = socket.socket(fileno=3)
    control.set_inheritable(False)
    warm()
    gc.collect()
    # The collector would write to every object's page.
    gc.freeze()
    before = installed()
    wake, wakes = socket.socketpair()
    for end in (wake, wakes):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The terminal's interrupt is for kernels alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        serve(selector, control, wake, wakes, before)


def serve(selector, control, wake, wakes, before):
    kernels = set()
    rest = b""

    def say(**message):
        control.sendall(json.dumps(message).encode() + b"\n")

    say(ready=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is wake:
                try:
                    wake.recv(4096)
                except BlockingIOError:
                    pass
                continue
            data = control.recv(MIB)
            if not data:
                for pid in kernels:
                    os.killpg(pid, signal.SIGKILL)
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for end in (control, wake, wakes):
                        end.close()
                    child(request, installed() == before)
                kernels.add(pid)
                say(id=request["id"], pid=pid)
        while kernels:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            kernels.discard(pid)
            say(ended=pid, status=status)


if __name__ == "__main__":
    main()
