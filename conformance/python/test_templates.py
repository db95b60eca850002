"""Templates built with the official SDK: steps, layers that are reused, tags, failures."""

import time
import uuid

import pytest
from e2b import BuildException, Sandbox, SandboxException, Template, wait_for_file, wait_for_port, wait_for_timeout

NAME = f"py-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    root = tmp_path_factory.mktemp("context")
    (root / "app/lib").mkdir(parents=True)
    (root / "app/main.py").write_text("print('main')\n")
    (root / "app/lib/x.txt").write_text("x")
    (root / "app/skipped.log").write_text("no")
    (root / "tool.sh").write_text("#!/bin/sh\necho tool\n")
    (root / ".dockerignore").write_text("**/*.log\n")
    return root


@pytest.fixture(scope="module", autouse=True)
def gone_afterwards(api):
    yield
    for template in api.get("/templates").json():
        if any(name.startswith(NAME) for name in template["names"]):
            assert api.delete(f"/templates/{template['templateID']}").status_code == 204


def build(template, name=NAME, **options):
    """Builds and answers how long it took and what was said."""
    lines, began = [], time.monotonic()
    Template.build(template, name, on_build_logs=lambda entry: lines.append(entry.message), **options)
    return time.monotonic() - began, lines


def template(context, last):
    return (
        Template(file_context_path=context)
        .from_template("base")
        # Of this run: what an earlier one left in the cache is not found.
        .set_envs({"GREETING": "hello", "MARK": NAME})
        .copy("app", "/srv/app")
        .copy("tool.sh", "bin/", mode=0o755, user="root")
        .set_envs({"BOTH": "$GREETING again", "PATH": "/home/user/bin:/usr/local/bin:/usr/bin:/bin"})
        .set_workdir("/srv/work")
        .run_cmd(["echo $GREETING > greeting", "pwd > where"])
        .run_cmd("id -un > /tmp/who; date +%s%N > /tmp/once", user="root")
        .set_user("builder")
        .run_cmd(last)
        .set_start_cmd("python3 -m http.server 8123 --directory /srv/app", wait_for_port(8123))
    )


def executed(lines):
    return sum(line.startswith("DONE") for line in lines), sum(line.startswith("CACHED") for line in lines)


def test_everything_a_template_can_say(context):
    first, lines = build(template(context, "echo one > /tmp/last"))
    # Nine instructions, and the end.
    assert executed(lines) == (10, 0), lines
    with Sandbox.create(NAME, timeout=300) as sandbox:
        run = lambda line: sandbox.commands.run(line).stdout.strip()  # noqa: E731
        assert run("cat /srv/work/greeting /srv/work/where") == "hello\n/srv/work"
        assert run("find /srv/app -type f | sort") == "/srv/app/lib/x.txt\n/srv/app/main.py"
        assert run("stat -c '%a %U' /home/user/bin/tool.sh /srv/app/main.py") == "755 root\n644 user"
        assert run("tool.sh") == "tool"
        assert run("cat /tmp/who /tmp/last") == "root\none"
        assert run("echo $BOTH; whoami; pwd") == "hello again\nbuilder\n/srv/work"
        # It runs since the template was built.
        assert run("curl -s localhost:8123/main.py") == "print('main')"
        once = run("cat /tmp/once")
    again, lines = build(template(context, "echo one > /tmp/last"))
    assert executed(lines) == (0, 10), lines
    assert again < first / 10, (again, first)
    _, lines = build(template(context, "echo two > /tmp/last"))
    assert executed(lines) == (2, 8), lines
    with Sandbox.create(NAME, timeout=300) as sandbox:
        assert sandbox.commands.run("cat /tmp/last").stdout == "two\n"
        assert sandbox.commands.run("cat /tmp/once").stdout.strip() == once


def test_changed_files_are_copied_again(context, tmp_path):
    (tmp_path / "f").write_text("1")
    make = lambda: Template(file_context_path=tmp_path).from_template("base").run_cmd(f"echo {NAME}").copy("f", "/f", user="root")  # noqa: E731
    name = f"{NAME}-files"
    assert executed(build(make(), name)[1]) == (3, 0)
    (tmp_path / "f").write_text("2")
    assert executed(build(make(), name)[1]) == (2, 1)
    with Sandbox.create(name, timeout=300) as sandbox:
        assert sandbox.files.read("/f") == "2"


def test_force_does_it_again():
    name = f"{NAME}-force"
    make = lambda: Template().from_template("base").run_cmd(f"echo {NAME}")  # noqa: E731
    build(make(), name)
    forced = Template().from_template("base").skip_cache().run_cmd(f"echo {NAME}")
    assert executed(build(forced, name)[1]) == (2, 0)
    assert executed(build(make(), name)[1]) == (0, 2)


def test_a_failing_step_says_which_and_why(api):
    bad = Template().from_template("base").run_cmd("touch /tmp/before").run_cmd("echo out; echo err >&2; exit 3")
    with pytest.raises(BuildException, match="exit status 3") as failure:
        build(bad, f"{NAME}-bad")
    assert "out" in str(failure.value) and "err" in str(failure.value)
    [mine] = [t for t in api.get("/templates").json() if f"{NAME}-bad" in t["names"]]
    [build_row] = api.get(f"/templates/{mine['templateID']}").json()["builds"]
    status = api.get(f"/templates/{mine['templateID']}/builds/{build_row['buildID']}/status").json()
    assert status["status"] == "error" and status["reason"]["step"] == "2"
    # What was there before the step can be looked at.
    with Sandbox.create(status["reason"]["layer"], timeout=300) as sandbox:
        assert sandbox.files.exists("/tmp/before")
    with pytest.raises(SandboxException, match="has no build"):
        Sandbox.create(f"{NAME}-bad")


def test_what_is_started_must_become_ready():
    ends = Template().from_template("base").set_start_cmd("echo no such luck; exit 7", wait_for_port(1))
    with pytest.raises(BuildException, match="no such luck"):
        build(ends, f"{NAME}-ends")
    slow = Template().from_template("base").set_start_cmd("sleep 1; touch /tmp/ready; sleep 1000", wait_for_file("/tmp/ready"))
    build(slow, f"{NAME}-slow")
    with Sandbox.create(f"{NAME}-slow", timeout=300) as sandbox:
        assert sandbox.files.exists("/tmp/ready")


def test_templates_upon_templates():
    """Context and start command come along, unless they are said anew."""
    lower = Template().from_template("base").set_envs({"A": "1"}).set_workdir("/opt").set_start_cmd("sleep 4242", wait_for_timeout(100))
    build(lower, f"{NAME}-lower")
    build(Template().from_template(f"{NAME}-lower").run_cmd("echo $A; pwd > /tmp/where"), f"{NAME}-same")
    with Sandbox.create(f"{NAME}-same", timeout=300) as sandbox:
        assert sandbox.commands.run("cat /tmp/where; echo $A; pgrep -fx 'sleep 4242' | wc -l").stdout == "/opt\n1\n1\n"
    build(Template().from_template(f"{NAME}-lower").set_start_cmd("sleep 4343", wait_for_timeout(100)), f"{NAME}-other")
    with Sandbox.create(f"{NAME}-other", timeout=300) as sandbox:
        assert sandbox.commands.run("pgrep -fx 'sleep 4242' | wc -l; pgrep -fx 'sleep 4343' | wc -l").stdout == "0\n1\n"
    # Other sizes: it is booted, and what was started is started.
    build(Template().from_template(f"{NAME}-lower").run_cmd("true"), f"{NAME}-large", cpu_count=2, memory_mb=640)
    with Sandbox.create(f"{NAME}-large", timeout=300) as sandbox:
        out = sandbox.commands.run("nproc; awk '/MemTotal/ {print int($2 / 1024 / 100)}' /proc/meminfo; pgrep -fx 'sleep 4242' | wc -l").stdout
        assert out == "2\n5\n1\n" or out == "2\n6\n1\n", out
        info = sandbox.get_info()
        assert (info.cpu_count, info.memory_mb) == (2, 640)


def test_tags():
    name = f"{NAME}-tags"
    one = lambda n: Template().from_template("base").run_cmd(f"echo {n} > /tmp/n")  # noqa: E731
    build(one(1), f"{name}:v1")
    build(one(2), name, tags=["v2", "stable"])
    read = lambda target: Sandbox.create(target, timeout=300)  # noqa: E731
    for target, expected in [(f"{name}:v1", "1\n"), (f"{name}:v2", "2\n"), (f"{name}:stable", "2\n")]:
        with read(target) as sandbox:
            assert sandbox.files.read("/tmp/n") == expected, target
    with pytest.raises(SandboxException, match="has no build"):
        Sandbox.create(f"{name}:v3")
    Template.assign_tags(f"{name}:v1", ["stable"])
    with read(f"{name}:stable") as sandbox:
        assert sandbox.files.read("/tmp/n") == "1\n"
    assert {t.tag for t in Template.get_tags(name)} == {"v1", "v2", "stable"}
    Template.remove_tags(name, ["v2"])
    assert {t.tag for t in Template.get_tags(name)} == {"v1", "stable"}
    with pytest.raises(Exception, match="cannot be removed"):
        Template.remove_tags(name, ["default"])
    assert Template.exists(name) and not Template.exists(f"{name}-no")


@pytest.mark.parametrize(
    "body,text",
    [
        ({"fromTemplate": "base", "steps": [{"type": "FLY", "args": ["x"]}]}, "is no instruction"),
        ({"fromTemplate": "base", "steps": [{"type": "RUN", "args": []}]}, "has no command"),
        ({"fromTemplate": "nowhere"}, "was not found"),
        ({"fromImage": "UPPER/case"}, "is not an image reference"),
        ({"fromImage": "x", "fromTemplate": "base"}, "not both"),
        ({}, "is missing"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(api, body, text):
    made = api.post("/v3/templates", json={"name": f"{NAME}-refused"}).json()
    answer = api.post(f"/v2/templates/{made['templateID']}/builds/{made['buildID']}", json=body)
    assert answer.status_code in (400, 404) and text in answer.json()["message"], answer.text


def test_uploads_that_nobody_announced(api):
    assert api.put("/build-files/0123456789abcdef", content=b"x").status_code == 403
    assert api.put("/build-files/../../etc", content=b"x").status_code in (403, 404)
    made = api.post("/v3/templates", json={"name": f"{NAME}-refused"}).json()
    bad = api.get(f"/templates/{made['templateID']}/files/..%2F..%2Fx")
    assert bad.status_code == 400 and "is not the hash" in bad.json()["message"]
