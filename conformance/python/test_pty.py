"""Pseudo-terminals through the official Python SDK."""

import pytest
from e2b import CommandExitException, PtySize


class Screen:
    """Reads a terminal until a text appears, keeping everything seen."""

    def __init__(self, handle):
        self.handle, self.events, self.seen = handle, iter(handle), ""

    def until(self, text):
        while text not in self.seen:
            _, _, data = next(self.events)
            self.seen += (data or b"").decode(errors="replace")
        head, _, self.seen = self.seen.partition(text)
        return head


@pytest.fixture
def terminal(sbx):
    handle = sbx.pty.create(PtySize(rows=24, cols=80), envs={"PS1": "$ ", "COLOUR": "blue"}, cwd="/tmp", timeout=60)
    yield handle, Screen(handle)
    sbx.pty.kill(handle.pid)


def test_it_is_a_terminal_with_its_size_user_envs_and_cwd(sbx, terminal):
    handle, screen = terminal
    sbx.pty.send_stdin(handle.pid, b"tty; stty size; id -un; echo $TERM-$COLOUR; pwd; echo en''d\n")
    text = screen.until("end\r\n")
    for part in ("/dev/pts/", "24 80", "user", "xterm-256color-blue", "/tmp"):
        assert part in text, text


def test_resize_reaches_the_program(sbx, terminal):
    handle, screen = terminal
    sbx.pty.send_stdin(handle.pid, b"trap 'echo re''sized' WINCH; echo se''t\n")
    screen.until("set\r\n")
    sbx.pty.resize(handle.pid, PtySize(rows=40, cols=132))
    sbx.pty.send_stdin(handle.pid, b"stty size; echo en''d\n")
    assert "40 132" in screen.until("end\r\n")


def test_control_c_interrupts(sbx, terminal):
    handle, screen = terminal
    # The text comes from the program that is to be interrupted, when the terminal is already its own.
    sbx.pty.send_stdin(handle.pid, b"sh -c 'echo wai\"\"ting; exec sleep 600'\n")
    screen.until("waiting\r\n")
    sbx.pty.send_stdin(handle.pid, b"\x03")
    sbx.pty.send_stdin(handle.pid, b"echo ali''ve\n")
    screen.until("alive\r\n")


def test_exit_code(sbx):
    handle = sbx.pty.create(PtySize(rows=24, cols=80))
    sbx.pty.send_stdin(handle.pid, b"exit 5\n")
    with pytest.raises(CommandExitException) as caught:
        handle.wait()
    assert caught.value.exit_code == 5


def test_input_streamed(sbx, terminal):
    handle, screen = terminal
    sbx.pty.stream_input(handle.pid, ["echo stre", "am''ed\n"])
    screen.until("streamed\r\n")


def test_connect_to_a_running_terminal(sbx):
    handle = sbx.pty.create(PtySize(rows=24, cols=80))
    handle.disconnect()
    again = sbx.pty.connect(handle.pid)
    sbx.pty.send_stdin(again.pid, b"echo ba''ck\n")
    Screen(again).until("back\r\n")
    assert sbx.pty.kill(again.pid) is True


def test_kill(sbx):
    handle = sbx.pty.create(PtySize(rows=24, cols=80))
    assert handle.pid in {p.pid for p in sbx.commands.list()}
    assert handle.kill() is True
    with pytest.raises(CommandExitException):
        handle.wait()
    assert sbx.pty.kill(handle.pid) is False
