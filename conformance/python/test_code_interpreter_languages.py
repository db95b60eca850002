"""The code interpreter: time, environment, other machines, other languages. What a cell gives is in test_code_interpreter.py."""

import threading
import time

import httpx
import pytest
from e2b import TimeoutException
from e2b_code_interpreter import Sandbox
from e2b_code_interpreter.charts import LineChart
from test_code_interpreter import built, context, make, pytestmark, sandbox  # noqa: F401 fixtures


# ---- time, environment, machines


@pytest.mark.parametrize("code, language", [
    ("import time; time.sleep(300)", "python"), ("while True: pass", "python"), ("import os; os.system('sleep 300')", "python"),
    ("while (true) {}", "javascript"), ("await new Promise(() => setTimeout(() => {}, 300000))", "javascript"), ("sleep 300", "bash"),
])
def test_a_cell_that_takes_too_long_is_interrupted(sandbox, code, language):
    first = {"python": "kept = 7", "javascript": "kept = 7", "bash": "kept=7"}[language]
    sandbox.run_code(first, language=language)
    with pytest.raises(TimeoutException):
        sandbox.run_code(code, language=language, timeout=3)
    began = time.monotonic()
    again = {"python": "kept", "javascript": "kept", "bash": "echo $kept"}[language]
    done = sandbox.run_code(again, language=language, timeout=60)
    assert (done.text or "".join(done.logs.stdout)).strip() == "7" and time.monotonic() - began < 45


def test_a_cell_that_waits_its_turn_is_not_run_for_somebody_who_left(sandbox, context):
    running = threading.Thread(target=sandbox.run_code, args=("import time; time.sleep(6)",), kwargs={"context": context})
    running.start()
    time.sleep(0.5)
    with pytest.raises(TimeoutException):
        sandbox.run_code("left = 1", context=context, timeout=2)
    running.join()
    assert sandbox.run_code("'left' in globals()", context=context).text == "False"


def test_killing_the_sandbox_ends_the_execution():
    sandbox = make()
    timer = threading.Timer(2, sandbox.kill)
    timer.start()
    with pytest.raises(TimeoutException, match="killed while the request was in progress"):
        sandbox.run_code("import time; time.sleep(300)", timeout=300)
    timer.join()


VARIABLE = {
    "python": ("import os; os.getenv('{}', 'none')", None), "javascript": ("process.env.{} || 'none'", None),
    "typescript": ("process.env.{} || 'none'", None), "bash": ("echo ${{{}:-none}}", "stdout"),
}


def test_environment_variables_of_the_sandbox_and_of_one_cell():
    sandbox = make(envs={"FOR_ALL": "super test", "QUOTED": "it's \"$HOME\" `x`\n\\n"})
    try:
        for language, (code, where) in VARIABLE.items():
            def value(name, **options):
                done = sandbox.run_code(code.format(name), language=language, **options)
                assert done.error is None, (language, done.error)
                return "".join(done.logs.stdout).removesuffix("\n") if where else done.text
            assert value("FOR_ALL") == "super test", language
            assert value("FOR_ALL", envs={"FOR_ALL": "for one"}) == "for one", language
            assert value("FOR_ALL") == "super test", language
            assert value("ONCE", envs={"ONCE": "it's"}) == "it's" and value("ONCE") == "none", language
        assert sandbox.run_code("import os; print(os.environ['QUOTED'], end='')").logs.stdout == ["it's \"$HOME\" `x`\n\\n"]
        fresh = sandbox.create_code_context()
        assert sandbox.run_code("import os; os.environ['FOR_ALL']", context=fresh).text == "super test"
    finally:
        sandbox.kill()


def test_two_sandboxes_do_not_draw_the_same_numbers():
    code = "import random, numpy; (random.random(), numpy.random.rand())"
    seen = []
    for _ in range(2):
        sandbox = make()
        seen.append(sandbox.run_code(code).text)
        sandbox.kill()
    assert seen[0] != seen[1]


def test_state_survives_a_pause():
    sandbox = make()
    sandbox.run_code("import pandas as pd; frame = pd.DataFrame({'a': [1, 2]})")
    sandbox.pause()
    sandbox = Sandbox.connect(sandbox.sandbox_id)
    assert sandbox.run_code("int(frame.a.sum())").text == "3"
    sandbox.kill()


def test_private_traffic(built):
    sandbox = make(secure=True, network={"allow_public_traffic": False}, envs={"A": "b"})
    try:
        assert sandbox.run_code("import os; os.environ['A']").text == "b"
        made = sandbox.create_code_context()
        sandbox.restart_code_context(made)
        assert made.id in [c.id for c in sandbox.list_code_contexts()]
        sandbox.remove_code_context(made)
    finally:
        sandbox.kill()


# ---- other languages


@pytest.mark.parametrize("language", ["js", "ts"])
def test_javascript(sandbox, language):
    def run(code):
        return sandbox.run_code(code, language=language)

    assert run("console.log('Hello'); console.error('bad')").logs.stdout == ["Hello\n"]
    assert run("process.cwd()").text == "/home/user"
    # What a cell declares is there for the next and may be declared again.
    assert run("const a = 1; let { b, c: [d] } = { b: 2, c: [3] }; class K { v() { return 4 } }; function f() { return 5 }").results == []
    assert run("const a = 10; a + b + d + new K().v() + f()").text == "24"
    assert run("import { readFileSync as read } from 'fs'\nimport * as path from 'node:path'\nimport os from 'os'\ntypeof read + path.sep").text == "function/"
    assert run("typeof read + typeof os.cpus").text == "functionfunction"
    assert run("const later = await Promise.resolve(7); later + 1").text == "8" and run("later").text == "7"
    assert "".join(run("for await (const n of [1, 2]) console.log(n)").logs.stdout) == "1\n2\n"
    assert run("({ a: 1, b: [2] })").text == "{ a: 1, b: [ 2 ] }" and run("{ x: 1 }").text == "{ x: 1 }"
    shown = run("display({ 'text/html': '<b>h</b>' }, { raw: true }); $$.svg('<svg/>'); undefined").results
    assert [(r.html, r.svg, r.is_main_result) for r in shown] == [("<b>h</b>", None, False), (None, "<svg/>", False)]
    wrong = run("function bad() { throw new RangeError('too far') }\nbad()")
    assert (wrong.error.name, wrong.error.value) == ("RangeError", "too far") and "at bad (cell-" in wrong.error.traceback
    assert run("await Promise.reject(new TypeError('later'))").error.name == "TypeError"
    assert run("let x = ;").error.name == "SyntaxError" and run("throw 'text'").error.value == "'text'"
    assert run("setTimeout(() => { throw new Error('loose') }, 1); 1").text == "1" and run("2").text == "2"
    assert run("process.exit(3)").error.name == "UnexpectedEndOfExecution" and run("typeof K").text == "undefined"


def test_typescript_has_types(sandbox):
    code = "interface P { name: string }\nenum E { A = 1 }\nconst p: P = { name: 'n' } as P\nconsole.log(p.name, E.A)"
    assert sandbox.run_code(code, language="ts").logs.stdout == ["n 1\n"]
    assert sandbox.run_code("const m: string =", language="ts").error.name == "SyntaxError"
    # One language's names are not the other's.
    assert sandbox.run_code("typeof p", language="js").text == "undefined"


def test_bash(sandbox):
    context = sandbox.create_code_context(language="bash", cwd="/tmp")

    def run(code, **options):
        return sandbox.run_code(code, context=context, **options)

    done = run("pwd; x=5; say() { echo said $1; }; echo bad >&2; cd /usr")
    assert (done.logs.stdout, done.logs.stderr, done.error) == (["/tmp\n"], ["bad\n"], None)
    assert "".join(run("say $x; pwd; cat").logs.stdout) == "said 5\n/usr\n"
    failed = run("false")
    assert (failed.error.name, failed.error.value) == ("ExitStatus", "1") and "".join(run("echo $?").logs.stdout) == "1\n"
    wrong = run("if then")
    assert wrong.error and "syntax error" in "".join(wrong.logs.stderr)
    assert "".join(run("cat <<EOF\na b\nEOF\nfor i in 1 2; do\n  echo $i\ndone").logs.stdout) == "a b\n1\n2\n"
    assert "".join(run("head -c 300000 /dev/zero | tr '\\0' x").logs.stdout) == "x" * 300000
    assert "".join(run("printf 'no end'").logs.stdout) == "no end"
    # Output that was turned elsewhere stays there, and the cell still ends.
    assert run("exec >/tmp/turned; echo into the file").logs.stdout == []
    assert "".join(run("cat /tmp/turned >&2").logs.stderr) == "into the file\n"
    assert run("exit 4").error.name == "UnexpectedEndOfExecution" and "".join(run("echo ${x:-gone}").logs.stdout) == "gone\n"
    sandbox.remove_code_context(context)


def test_requests_that_are_wrong(sandbox):
    url = sandbox._jupyter_url
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49999"}
    for body, status in (
        (b"{", 400), (b"[]", 400), (b"{}", 422), (b'{"code": 1}', 422), (b'{"code": "1", "env_vars": {"A B": "x"}}', 422),
        (b'{"code": "1", "context_id": "x", "language": "python"}', 400), (b'{"code": "1", "context_id": "x"}', 404),
        (b'{"code": "1", "language": "cobol"}', 400),
    ):
        answer = httpx.post(f"{url}/execute", content=body, headers=headers, timeout=60)
        assert answer.status_code == status and answer.text, (body, answer.status_code, answer.text)
    assert httpx.get(f"{url}/nothing", headers=headers, timeout=60).status_code == 404
    allowed = httpx.options(f"{url}/execute", headers=headers, timeout=60)
    assert allowed.status_code == 204 and allowed.headers["access-control-allow-origin"] == "*"


def test_a_context_that_is_removed_or_restarted_under_its_cells(sandbox):
    for end, errors in ((sandbox.remove_code_context, ["UnexpectedEndOfExecution", "KernelError"]), (sandbox.restart_code_context, ["UnexpectedEndOfExecution", None])):
        context = sandbox.create_code_context()
        seen = []
        cells = [threading.Thread(target=lambda code=code: seen.append(sandbox.run_code(code, context=context))) for code in ("import time; time.sleep(120)", "1")]
        for cell in cells:
            cell.start()
            time.sleep(1)
        end(context)
        for cell in cells:
            cell.join()
        assert [done.error and done.error.name for done in seen] == errors, seen
    sandbox.remove_code_context(context)
    # Nobody is left behind: as many kernels as Python contexts.
    counted = sandbox.commands.run("pgrep -c -P $(pgrep -f '[i]nterpreter.zygote' | head -n 1)").stdout.strip()
    assert int(counted) == len([c for c in sandbox.list_code_contexts() if c.language == "python"])


def test_any_kernel_that_is_installed_is_a_language():
    sandbox = make(envs={"FOR_ALL": "x"})
    try:
        sandbox.commands.run("sudo python3 -m ipykernel install --name own-kernel", timeout=120)
        context = sandbox.create_code_context(language="own-kernel", cwd="/tmp", request_timeout=120)
        done = sandbox.run_code("import os, sys; print(os.getcwd()); 'interpreter' in sys.argv[0]", context=context)
        assert (done.logs.stdout, done.text, context.language) == (["/tmp\n"], "False", "own-kernel")
        assert sandbox.run_code("1 / 0", context=context).error.name == "ZeroDivisionError"
        with pytest.raises(TimeoutException):
            sandbox.run_code("import time; time.sleep(300)", context=context, timeout=3)
        sandbox.restart_code_context(context)
        assert sandbox.run_code("'sys' in globals()", context=context).text == "False"
        sandbox.remove_code_context(context)
        assert sandbox.commands.run("pgrep -f '[i]pykernel_launcher' || echo none").stdout == "none\n"
    finally:
        sandbox.kill()


def test_what_was_installed_is_found_by_the_next_kernel():
    sandbox = make()
    try:
        own = "import pandas as pd; (hasattr(pd, 'mine'), pd.__version__)"
        assert "False" in sandbox.run_code(own).text
        # As `pip install` of another version does it.
        sandbox.commands.run("sudo mkdir -p /usr/local/lib/python3.11/dist-packages/pandas && "
                             "echo '__version__ = \"99\"; mine = 1' | sudo tee /usr/local/lib/python3.11/dist-packages/pandas/__init__.py")
        context = sandbox.create_code_context(request_timeout=120)
        assert sandbox.run_code(own, context=context).text == "(True, '99')"
        assert sandbox.run_code("import sys; sys.path[0]", context=context).text == ""
        done = sandbox.run_code("import matplotlib.pyplot as plt; plt.plot([1]); plt.show()", context=context)
        assert isinstance(done.results[0].chart, LineChart)
    finally:
        sandbox.kill()
