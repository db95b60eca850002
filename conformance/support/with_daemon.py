"""Runs a command against a daemon of its own: `python -m support.with_daemon -- COMMAND...`

Brings up `nidus serve` on the test data directory (building the base template at the first start,
with its log shown meanwhile), makes a key, sets the E2B_ variables, runs the command, and
ends the daemon. The exit code is the command's, or 1 when the daemon did not end with 0.
"""

import os
import subprocess
import sys
import threading
import time

from .daemon import Daemon


def follow(daemon: Daemon, stop: threading.Event) -> None:
    """Shows the daemon's log while it starts; quiet when the start takes under two seconds."""
    if stop.wait(2):
        return
    with open(daemon.log_path, "rb") as log:
        log.seek(daemon.log_start)
        while True:
            line = log.readline()
            if line:
                sys.stderr.write("  nidus: " + line.decode(errors="replace"))
                sys.stderr.flush()
            elif stop.wait(0.2):
                return


def start_and_show(daemon: Daemon) -> float:
    """Starts the daemon with its log shown; answers how many seconds it took."""
    began = time.monotonic()
    stop = threading.Event()
    daemon.log_start = daemon.log_path.stat().st_size if daemon.log_path.exists() else 0
    daemon.log_path.parent.mkdir(parents=True, exist_ok=True)
    daemon.log_path.touch()
    follower = threading.Thread(target=follow, args=(daemon, stop), daemon=True)
    follower.start()
    try:
        daemon.start()
    finally:
        stop.set()
        follower.join()
    return time.monotonic() - began


def main() -> int:
    command = sys.argv[sys.argv.index("--") + 1 :]
    daemon = Daemon()
    try:
        seconds = start_and_show(daemon)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"nidus is up at {daemon.api_url} (in {seconds:.1f} s)", file=sys.stderr)
    try:
        env = {k: v for k, v in os.environ.items() if not k.startswith("E2B_")}
        env |= daemon.sdk_env() | {
            "NIDUS_TEST_ADMIN_TOKEN": daemon.admin_token,
            "NIDUS_TEST_DAEMON_PID": str(daemon.process.pid),
        }
        if cleared := daemon.clear():
            print(f"killed {cleared} sandboxes that an earlier run had left", file=sys.stderr)
        code = subprocess.run(command, env=env).returncode
    finally:
        if daemon.process.poll() is None:
            ended = daemon.terminate()
        else:
            ended = daemon.process.returncode
            print("nidus serve ended while the tests ran", file=sys.stderr)
    if ended != 0:
        print(f"nidus serve ended with exit code {ended}; its last words:\n{daemon.log()}", file=sys.stderr)
    if code and daemon.log_path.exists():
        print(f"the daemon's log is {daemon.log_path}", file=sys.stderr)
    return code or (1 if ended else 0)


if __name__ == "__main__":
    sys.exit(main())
