"""commands.run and its relatives, through the official synchronous Python SDK."""

import threading
import time

import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    TimeoutException,
)
from support.daemon import wait_for


def pids(sbx):
    return {process.pid for process in sbx.commands.list()}


def test_stdout_stderr_and_exit_code(sbx):
    result = sbx.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)


def test_a_failing_command_raises_with_all_it_said(sbx):
    with pytest.raises(CommandExitException) as caught:
        sbx.commands.run("echo so far; echo so bad >&2; exit 7")
    assert caught.value.exit_code == 7
    assert caught.value.stdout == "so far\n"
    assert caught.value.stderr == "so bad\n"


def test_an_unknown_command_is_bashs_127(sbx):
    with pytest.raises(CommandExitException) as caught:
        sbx.commands.run("no-such-program-here")
    assert caught.value.exit_code == 127
    assert "not found" in caught.value.stderr


def test_output_is_exact(sbx):
    """Unicode, no newline at the end, and output that spans many messages."""
    assert sbx.commands.run("printf 'žluťoučký 🦀 %s' end").stdout == "žluťoučký 🦀 end"
    assert sbx.commands.run("true").stdout == ""
    big = sbx.commands.run("seq 1 60000").stdout
    assert big == "".join(f"{n}\n" for n in range(1, 60001))


def test_bytes_that_are_not_utf8_do_not_break_the_stream(sbx):
    assert sbx.commands.run(r"printf 'a\377b'").stdout == "a\ufffdb"


def test_callbacks_stream_while_the_command_runs(sbx, folder):
    """The command waits for a file that only the callback makes: output held back would hang it."""
    seen = []

    def on_stdout(text):
        seen.append(text)
        if "ready" in text:
            sbx.files.write(f"{folder}/go", "now")

    errors = []
    result = sbx.commands.run(
        f"echo ready; until [ -e {folder}/go ]; do sleep 0.05; done; echo done; echo problem >&2",
        on_stdout=on_stdout,
        on_stderr=errors.append,
    )
    assert "".join(seen) == "ready\ndone\n" == result.stdout
    assert "".join(errors) == "problem\n"


def test_envs_of_the_sandbox_and_of_the_command(sbx):
    show = 'echo "$GREETING $PLACE $EXTRA"'
    assert sbx.commands.run(show).stdout == "hello base \n"
    assert sbx.commands.run(show, envs={"PLACE": "it's \"here\" $HOME", "EXTRA": "ünï\nx"}).stdout == (
        "hello it's \"here\" $HOME ünï\nx\n"
    )
    assert sbx.commands.run(show).stdout == "hello base \n", "one command's envs must not stay"


def test_the_default_user_and_its_surroundings(sbx):
    out = sbx.commands.run('id -un; echo "$HOME"; pwd; echo "$USER"').stdout
    assert out == "user\n/home/user\n/home/user\nuser\n"


def test_another_user(sbx):
    out = sbx.commands.run('id -u; echo "$HOME"; pwd', user="root").stdout
    assert out == "0\n/root\n/root\n"


def test_an_unknown_user_is_refused(sbx):
    with pytest.raises((AuthenticationException, InvalidArgumentException)) as caught:
        sbx.commands.run("true", user="nobody-by-this-name")
    assert "nobody-by-this-name" in str(caught.value)


def test_cwd(sbx, folder):
    sbx.files.make_dir(f"{folder}/deep dir")
    assert sbx.commands.run("pwd", cwd=f"{folder}/deep dir").stdout == f"{folder}/deep dir\n"
    assert sbx.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    with pytest.raises(InvalidArgumentException) as caught:
        sbx.commands.run("pwd", cwd="/no/such/folder")
    assert "/no/such/folder" in str(caught.value)


def test_stdin_is_absent_unless_asked_for(sbx):
    """Without `stdin=True` a program that reads sees the end at once instead of waiting."""
    assert sbx.commands.run("cat; echo over", timeout=20).stdout == "over\n"


def test_stdin_send_and_close(sbx):
    handle = sbx.commands.run("cat; echo end", background=True, stdin=True)
    sbx.commands.send_stdin(handle.pid, "first\n")
    handle.send_stdin("second žluť\n".encode())
    sbx.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "first\nsecond žluť\nend\n"


def test_stdin_streamed(sbx):
    """One request carries all the input: the client-streaming call."""
    handle = sbx.commands.run("head -c 200000 | md5sum", background=True, stdin=True)
    sbx.commands.stream_input(handle.pid, (b"0123456789" * 1000 for _ in range(20)))
    import hashlib

    assert handle.wait().stdout.split()[0] == hashlib.md5(b"0123456789" * 20000).hexdigest()


def test_stdin_to_a_process_that_is_not_there(sbx):
    with pytest.raises(NotFoundException):
        sbx.commands.send_stdin(4194000, "x")


def test_background_and_wait(sbx, folder):
    handle = sbx.commands.run(f"until [ -e {folder} ]; do sleep 0.05; done; echo late; exit 3", background=True)
    listed = {process.pid: process for process in sbx.commands.list()}
    assert handle.pid in listed
    process = listed[handle.pid]
    assert (process.cmd, process.args[:2]) == ("/bin/bash", ["-l", "-c"]) and folder in process.args[2]
    sbx.files.make_dir(folder)
    with pytest.raises(CommandExitException) as caught:
        handle.wait()
    assert (caught.value.exit_code, caught.value.stdout) == (3, "late\n")
    assert handle.pid not in pids(sbx)


def test_kill(sbx):
    handle = sbx.commands.run("sleep 600", background=True)
    assert handle.kill() is True
    with pytest.raises(CommandExitException) as caught:
        handle.wait()
    assert caught.value.exit_code != 0
    assert "killed" in (caught.value.error or "")
    assert sbx.commands.kill(handle.pid) is False, "it is gone by now"
    assert sbx.commands.kill(4194000) is False, "never was there"


def test_kill_by_pid_from_elsewhere(sbx):
    handle = sbx.commands.run("echo up; sleep 600", background=True)
    assert sbx.commands.kill(handle.pid) is True
    with pytest.raises(CommandExitException):
        handle.wait()


def test_disconnect_leaves_the_command_running_and_connect_finds_it(sbx, folder):
    handle = sbx.commands.run(
        f"until [ -e {folder}/1 ]; do sleep 0.05; done; echo one; until [ -e {folder}/2 ]; do sleep 0.05; done; echo two",
        background=True,
    )
    handle.disconnect()
    assert handle.pid in pids(sbx)
    again = sbx.commands.connect(handle.pid)
    other = sbx.commands.connect(handle.pid)
    assert again.pid == handle.pid
    sbx.files.write(f"{folder}/1", "")
    sbx.files.write(f"{folder}/2", "")
    assert again.wait().stdout == "one\ntwo\n"
    assert other.wait().stdout == "one\ntwo\n", "two listeners hear the same"


def test_connect_to_a_process_that_is_not_there(sbx):
    with pytest.raises(NotFoundException):
        sbx.commands.connect(4194000)


def test_timeout_ends_the_command(sbx):
    with pytest.raises(TimeoutException):
        sbx.commands.run("echo $$; exec sleep 601", timeout=1)
    wait_for(
        "the timed-out command to be gone from the sandbox",
        lambda: not any("sleep 601" in " ".join(p.args) for p in sbx.commands.list()),
        20,
        every=0.2,
    )


def test_timeout_zero_means_no_limit(sbx):
    assert sbx.commands.run("echo fine", timeout=0).stdout == "fine\n"


def test_a_background_child_does_not_hold_the_command(sbx):
    """A daemon left behind with the pipes closed must not keep the command open."""
    result = sbx.commands.run("setsid sleep 30 >/dev/null 2>&1 </dev/null & echo left", timeout=20)
    assert result.stdout == "left\n"
    sbx.commands.run("pkill -f 'sleep 3[0]' || true")


def test_commands_at_once(sbx):
    """Six commands from six threads do not mix."""
    outputs = {}

    def run(n):
        outputs[n] = sbx.commands.run(f"for i in 1 2 3; do echo {n}-$i; done").stdout

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {n: f"{n}-1\n{n}-2\n{n}-3\n" for n in range(6)}


def test_root_through_sudo(sbx):
    """E2B's default user may become root without a password."""
    assert sbx.commands.run("sudo -n id -u").stdout == "0\n"


def test_python_pip_git_curl_are_there(sbx):
    out = sbx.commands.run("python3 -c 'print(6 * 7)' && pip3 --version | cut -c1-4 && git --version | cut -c1-3 && curl --version | head -c4")
    assert out.stdout == "42\npip \ngit\ncurl"


def test_the_clock_is_right(new_sandbox):
    """The guest was snapshotted long ago; its clock must be the host's when it resumes."""
    fresh = new_sandbox()
    before = time.time()
    guest = float(fresh.commands.run("date +%s.%N").stdout)
    after = time.time()
    assert before - 2 <= guest <= after + 2
