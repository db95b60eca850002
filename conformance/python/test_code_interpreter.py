"""The package e2b-code-interpreter, unmodified, on the template of templates/code-interpreter."""

import asyncio
import base64
import os
import struct
import threading
import time

import pytest
from e2b import InvalidArgumentException, NotFoundException, SandboxException
from e2b_code_interpreter import AsyncSandbox, Sandbox
from e2b_code_interpreter.charts import BarChart, BoxAndWhiskerChart, LineChart, PieChart, ScatterChart, SuperChart
from support.interpreter import template

SECONDS = 900
pytestmark = [
    # The first of them waits for the template.
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("NIDUS_TESTBED") == "1", reason="no packages to make the template of in the test bed's machine"),
]


@pytest.fixture(scope="module", autouse=True)
def built():
    template()


def make(**options):
    return Sandbox.create(timeout=SECONDS, **options)


@pytest.fixture(scope="module")
def sandbox(built):
    made = make()
    yield made
    made.kill()


@pytest.fixture
def context(sandbox):
    made = sandbox.create_code_context()
    yield made
    sandbox.remove_code_context(made)


# ---- results


def test_state_stays_between_cells_and_the_last_value_is_the_result(sandbox, context):
    assert sandbox.run_code("x = 20\nimport math", context=context).results == []
    done = sandbox.run_code("print('out'); x += 1; math.sqrt(x * x) * 2", context=context)
    assert (done.text, done.logs.stdout, done.logs.stderr, done.error) == ("42.0", ["out\n"], [], None)
    assert done.execution_count == 2 and done.results[0].is_main_result


def test_indented_code_and_shell_lines(sandbox, context):
    done = sandbox.run_code("""
        import sys
        !pwd; whoami
        print("late", file=sys.stderr)
        "a text"
        """, context=context)
    assert "".join(done.logs.stdout).split() == ["/home/user", "root"] and done.logs.stderr == ["late\n"]
    assert done.text == "a text"


def test_output_is_streamed_as_it_comes(sandbox, context):
    seen = []
    code = "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(1.2)"
    sandbox.run_code(code, context=context, on_stdout=lambda m: seen.append((m.line, m.timestamp, time.time())))
    assert "".join(line for line, _, _ in seen) == "0\n1\n2\n"
    # The first came long before the last, by the guest's clock and by ours.
    assert seen[-1][1] - seen[0][1] > 1.5e9 and seen[-1][2] - seen[0][2] > 1.5


def test_all_of_a_large_output_arrives(sandbox, context):
    done = sandbox.run_code("for n in range(60000): print(n)\nimport os; os.system('seq 100000 100010')", context=context)
    numbers = [*range(60000), *range(100000, 100011)]
    assert "".join(done.logs.stdout) == "".join(f"{n}\n" for n in numbers)


def test_many_displays_all_arrive_in_order(sandbox, context):
    done = sandbox.run_code("for n in range(1100): display(n)", context=context)
    assert [r.text for r in done.results] == [str(n) for n in range(1100)]
    assert not any(r.is_main_result for r in done.results)


def test_a_frame_is_a_table_and_its_data(sandbox, context):
    done = sandbox.run_code("""
        import pandas as pd
        pd.DataFrame({"name": ["a", "b"], "n": [1, 2.5], "at": pd.to_datetime(["2024-01-02", None])})
        """, context=context)
    (result,) = done.results
    assert "<table" in result.html and "<td>2.5</td>" in result.html and "name" in result.text
    assert result.data == {"name": ["a", "b"], "n": [1.0, 2.5], "at": ["2024-01-02T00:00:00", None]}


def test_every_kind_of_result(sandbox, context):
    done = sandbox.run_code("""
        from IPython.display import HTML, Markdown, SVG, Latex, JSON, Javascript
        for shown in (HTML("<b>h</b>"), Markdown("*m*"), SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"),
                      Latex("$x$"), JSON({"a": [1]}), Javascript("alert(1)")):
            display(shown)
        display({"text/latex": "only"}, raw=True)
        display({"application/x-own": "mine", "text/plain": "t"}, raw=True)
        display({"application/pdf": "UERG", "image/jpeg": "SlBH"}, raw=True)
        {"k": [1, 2], "t": "x"}
        """, context=context)
    html, markdown, svg, latex, json, javascript, only, own, binary, main = done.results
    assert (html.html, markdown.markdown, latex.latex, javascript.javascript) == ("<b>h</b>", "*m*", "$x$", "alert(1)")
    assert svg.svg.startswith("<svg") and json.json == {"a": [1]} and only.formats() == ["latex"]
    assert own.extra == {"application/x-own": "mine"} and (binary.pdf, binary.jpeg) == ("UERG", "SlBH")
    assert main.json == {"k": [1, 2], "t": "x"} and main.is_main_result and done.text == "{'k': [1, 2], 't': 'x'}"


def test_an_exception_has_its_traceback(sandbox, context):
    done = sandbox.run_code("def inner():\n    return {}['missing']\n\ninner()", context=context)
    assert (done.error.name, done.error.value) == ("KeyError", "'missing'")
    assert "inner()" in done.error.traceback and "return {}['missing']" in done.error.traceback and "\x1b" not in done.error.traceback
    wrong = sandbox.run_code("a = = 1", context=context)
    assert wrong.error.name == "SyntaxError"
    assert sandbox.run_code("input()", context=context).error.name == "StdinNotImplementedError"
    # The context goes on.
    assert sandbox.run_code("1 + 1", context=context).text == "2"


def png_size(text):
    data = base64.b64decode(text)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def chart_of(sandbox, code, kind, **options):
    done = sandbox.run_code("import matplotlib.pyplot as plt, numpy as np, datetime\n" + code, **options)
    assert done.error is None, done.error
    (result,) = done.results
    width, height = png_size(result.png)
    assert width > 200 and height > 200 and result.text.startswith("<Figure size") and not result.extra
    assert isinstance(result.chart, kind), result.chart
    return result.chart


def test_lines(sandbox, context):
    chart = chart_of(sandbox, """
days = [datetime.date(2023, 9, 1) + datetime.timedelta(days=n) for n in range(10)]
plt.plot(days, np.sin(np.arange(10)), label="sin"); plt.plot(days, np.arange(10) * 2.0)
plt.axhline(0, color="k")
plt.xlabel("Time (s)"); plt.ylabel("Force [N]"); plt.title("Two"); plt.legend(); plt.grid(True); plt.show()
""", LineChart, context=context)
    assert (chart.title, chart.x_label, chart.x_unit, chart.y_label, chart.y_unit) == ("Two", "Time (s)", "s", "Force [N]", "N")
    assert (chart.x_scale, chart.y_scale) == ("datetime", "linear") and all(isinstance(t, str) for t in chart.x_ticks)
    assert [line.label for line in chart.elements] == ["sin", "Line 1"]
    assert chart.elements[1].points[3] == ("2023-09-04", 6.0) and len(chart.elements[0].points) == 10
    log = chart_of(sandbox, "plt.plot([1, 2, 3], [1.0, 10.0, float('nan')]); plt.yscale('log'); plt.show()", LineChart)
    assert log.y_scale == "log" and log.elements[0].points == [(1, 1.0), (2, 10.0), (3, None)]
    named = chart_of(sandbox, "plt.plot([1, 2, 3], ['A', 'B', 'A']); plt.show()", LineChart)
    assert (named.x_scale, named.y_scale) == ("linear", "categorical") and named.elements[0].points[1] == (2, "B")


def test_points(sandbox):
    chart = chart_of(sandbox, "plt.scatter([1, 2, 3], [4, 5, 6], label='first'); plt.scatter([0], [0]); plt.show()", ScatterChart)
    assert chart.elements[0].label == "first" and chart.elements[0].points == [(1, 4), (2, 5), (3, 6)]
    assert len(chart.elements) == 2


def test_bars(sandbox):
    chart = chart_of(sandbox, """
plt.bar(["A", "B", "C"], [3, 5, 5], label="Sold"); plt.xlabel("Who"); plt.ylabel("How many"); plt.show()
""", BarChart)
    assert [(b.label, b.value, b.group) for b in chart.elements] == [("A", 3, "Sold"), ("B", 5, "Sold"), ("C", 5, "Sold")]
    assert (chart.x_label, chart.y_label) == ("Who", "How many")
    lying = chart_of(sandbox, "plt.barh(['A', 'B'], [1, 2]); plt.ylabel('Who'); plt.show()", BarChart)
    assert [(b.label, b.value) for b in lying.elements] == [("A", 1), ("B", 2)] and lying.x_label == "Who"
    groups = chart_of(sandbox, """
x = np.arange(3)
plt.bar(x - 0.2, [1, 2, 3], 0.4, label="a"); plt.bar(x + 0.2, [4, 5, 6], 0.4, label="b", yerr=1)
plt.xticks(x, ["p", "q", "r"]); plt.show()
""", BarChart)
    assert [(b.label, b.value, b.group) for b in groups.elements] == [
        ("p", 1, "a"), ("q", 2, "a"), ("r", 3, "a"), ("p", 4, "b"), ("q", 5, "b"), ("r", 6, "b")]


def test_pies(sandbox):
    chart = chart_of(sandbox, "plt.pie([90, 10], labels=['No', 'Yes'], autopct='%1.1f%%'); plt.title('Up?'); plt.show()", PieChart)
    assert [(p.label, p.angle, p.radius) for p in chart.elements] == [("No", 324, 1), ("Yes", 36, 1)] and chart.title == "Up?"


@pytest.mark.parametrize("options", ["", ", patch_artist=True", ", vert=False"])
def test_boxes(sandbox, options):
    chart = chart_of(sandbox, f"""
data = {{"A": [85, 90, 78, 92, 88], "B": [95, 89, 76, 91, 84, 87], "C": [75, 82, 88, 79, 86]}}
fig, ax = plt.subplots(); ax.boxplot(data.values(), labels=data.keys(){options}); ax.set_title("Scores"); plt.show()
""", BoxAndWhiskerChart)
    assert [(b.label, b.min, b.first_quartile, b.median, b.third_quartile, b.max, b.outliers) for b in chart.elements] == [
        ("A", 78, 85, 88, 90, 92, []), ("B", 84, 84.75, 88, 90.5, 95, [76]), ("C", 75, 79, 82, 86, 88, [])]


def test_several_charts_in_one_figure_and_several_figures(sandbox):
    chart = chart_of(sandbox, """
fig, axes = plt.subplots(1, 2); fig.suptitle("Both")
axes[0].plot([1, 2], [3, 4]); axes[0].set_title("L"); axes[1].scatter([1], [2]); axes[1].set_xlabel("X"); plt.show()
""", SuperChart)
    left, right = chart.elements
    assert chart.title == "Both" and isinstance(left, LineChart) and isinstance(right, ScatterChart)
    assert (left.title, left.x_label, right.x_label) == ("L", None, "X")
    done = sandbox.run_code("plt.figure(); plt.plot([1, 2]); plt.figure(); plt.bar([1], [2]); None")
    assert [type(r.chart) for r in done.results] == [LineChart, BarChart]
    circle = sandbox.run_code("fig, ax = plt.subplots(); ax.add_artist(plt.Circle((0, 0), 1)); ax.plot([1]); plt.title('C'); plt.show()")
    assert circle.results[0].chart.type == "unknown" and circle.results[0].chart.title == "C"
    assert sandbox.run_code("plt.figure(); plt.show()").error is None


def test_pictures(sandbox, context):
    make_one = "import numpy as np\nfrom PIL import Image\npicture = Image.fromarray(np.zeros((9, 7, 3), dtype='uint8'))\n"
    for end in ("picture", "picture.show()", "picture.save('/tmp/p.png')"):
        done = sandbox.run_code(make_one + end, context=context)
        assert [png_size(r.png) for r in done.results] == [(7, 9)], (end, done)


def test_a_rehearsal_leaves_nothing(sandbox):
    sandbox.run_code("41 + 1")
    before = sandbox.run_code("seen = (_, len(Out), len(In)); None").execution_count
    sandbox.commands.run("curl -sf 'http://localhost:49999/health?rehearse=1'")
    after = sandbox.run_code("print(seen == (_, len(Out), len(In) - 1), _)")
    assert (after.logs.stdout, after.execution_count) == (["True 42\n"], before + 1)


# ---- contexts


def test_contexts_are_listed_made_and_removed(sandbox):
    languages = [c.language for c in sandbox.list_code_contexts()]
    assert "python" in languages and "javascript" in languages
    made = sandbox.create_code_context(cwd="/root", language="python")
    assert sandbox.list_code_contexts()[-1] == made and (made.language, made.cwd) == ("python", "/root")
    assert sandbox.run_code("import os; os.getcwd()", context=made).text == "/root"
    sandbox.remove_code_context(made)
    assert made.id not in [c.id for c in sandbox.list_code_contexts()]
    for call in (sandbox.remove_code_context, sandbox.restart_code_context, lambda c: sandbox.run_code("1", context=c)):
        with pytest.raises(NotFoundException, match="not found"):
            call(made)


def test_what_cannot_be_made_is_refused_in_words(sandbox):
    with pytest.raises(SandboxException, match="'/no/such' is not a directory"):
        sandbox.create_code_context(cwd="/no/such")
    with pytest.raises(SandboxException, match="'cobol'.*python"):
        sandbox.create_code_context(language="cobol")
    with pytest.raises(InvalidArgumentException):
        sandbox.run_code("1", language="js", context=sandbox.list_code_contexts()[0])


def test_contexts_know_nothing_of_each_other(sandbox, context):
    sandbox.run_code("mine = 1; import os; os.chdir('/tmp')", context=context)
    other = sandbox.create_code_context()
    assert sandbox.run_code("mine", context=other).error.value == "name 'mine' is not defined"
    assert sandbox.run_code("import os; os.getcwd()", context=other).text == "/home/user"
    sandbox.remove_code_context(other)


def test_a_restarted_context_is_empty(sandbox, context):
    sandbox.run_code("x = 1", context=context)
    sandbox.restart_code_context(context)
    done = sandbox.run_code("x", context=context)
    assert (done.error.name, done.execution_count) == ("NameError", 1)


def test_a_kernel_that_dies_is_told_and_replaced(sandbox, context):
    done = sandbox.run_code("x = 1\nimport os; os.kill(os.getpid(), 9)", context=context)
    assert done.error.name == "UnexpectedEndOfExecution" and "killed" in done.error.value
    assert sandbox.run_code("'x' in globals()", context=context).text == "False"


def test_the_server_starts_again_when_it_is_killed():
    sandbox = make()
    try:
        sandbox.commands.run("sudo pkill -9 -f '[i]nterpreter.server'")
        ready = "for n in $(seq 600); do curl -sf http://localhost:49999/health && exit; sleep 0.1; done; exit 1"
        assert sandbox.commands.run(ready, timeout=90).stdout == "OK"
        assert sandbox.run_code("x = 1; x").text == "1"
        sandbox.commands.run("sudo pkill -9 -f '[i]nterpreter.zygote'")
        # A cell that was sent before it was noticed is told so.
        first = sandbox.run_code("'x' in globals()")
        assert first.text == "False" or first.error.name == "UnexpectedEndOfExecution"
        assert sandbox.run_code("'x' in globals()").text == "False"
    finally:
        sandbox.kill()


def test_twenty_contexts_at_once(built):
    async def one(sandbox, n):
        context = await sandbox.create_code_context()
        await sandbox.run_code(f"mine = {n}; import time; time.sleep(0.2)", context=context)
        done = await sandbox.run_code("print(mine); mine * mine", context=context)
        # A kernel may send what it prints in pieces.
        return done.text, "".join(done.logs.stdout)

    async def all_of_them():
        sandbox = await AsyncSandbox.create(timeout=SECONDS, request_timeout=240)
        try:
            seen = await asyncio.gather(*(one(sandbox, n) for n in range(20)))
            assert seen == [(str(n * n), f"{n}\n") for n in range(20)]
            assert len(await sandbox.list_code_contexts()) == 22
        finally:
            await sandbox.kill()

    asyncio.run(all_of_them())


def test_the_async_sdk_manages_contexts(built):
    async def all_of_it():
        sandbox = await AsyncSandbox.create(timeout=SECONDS, request_timeout=240)
        try:
            made = await sandbox.create_code_context(language="python")
            await sandbox.run_code("mine = 1", context=made)
            await sandbox.restart_code_context(made)
            assert (await sandbox.run_code("mine", context=made)).error.name == "NameError"
            await sandbox.remove_code_context(made)
            assert made.id not in [c.id for c in await sandbox.list_code_contexts()]
        finally:
            await sandbox.kill()

    asyncio.run(all_of_it())


def test_cells_of_one_context_run_one_after_another(sandbox, context):
    sandbox.run_code("order = []", context=context)
    threads = [
        threading.Thread(target=sandbox.run_code, args=("import time; order.append('in'); time.sleep(0.3); order.append('out')",),
                         kwargs={"context": context})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sandbox.run_code("order", context=context).results[0].json == ["in", "out"] * 4
