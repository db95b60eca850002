"""Template builds that are cut off, the command line's build, and room among the layers."""

import json
import os
import random
import subprocess
import threading
import time
import uuid

import pytest
from e2b import BuildException, Sandbox, Template
from support import sandboxes
from support.daemon import DEFAULT_DATA_DIR, wait_for

NAME = f"build-{uuid.uuid4().hex[:8]}"
ROUNDS = int(os.environ.get("NIDUS_TEST_ROUNDS", "2"))


def work():
    return DEFAULT_DATA_DIR / "build"


def delete(daemon, name=NAME):
    sandboxes.delete_templates(daemon, name)


def build(daemon, template, name=NAME):
    return sandboxes.build(daemon, template, name)


def slow(n):
    return Template().from_template("base").run_cmd(f"echo {n} > /tmp/a; sleep 0.3").run_cmd("head -c 20M /dev/urandom > /tmp/b").run_cmd("sleep 0.3")


# The first, since others below throw the layers away that suites before this one have left.
def test_the_command_line_builds_a_dockerfile(daemon, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/app.py").write_text("print('from the image')\n")
    (tmp_path / "src/no.log").write_text("no")
    (tmp_path / ".dockerignore").write_text("**/*.log\n")
    (tmp_path / "Dockerfile").write_text(
        "ARG SUITE=bookworm\nFROM debian:${SUITE}\nARG WHO=nobody\nENV GREETING=\"hello $WHO\"\n"
        "ENV PATH=/app:$PATH\nWORKDIR /app\nCOPY --chmod=0755 src ./\nRUN echo $GREETING > greeting \\\n && ls > listing\n"
        'EXPOSE 80\nCMD ["python3", "-m", "http.server", "8080"]\n'
    )
    name = f"{NAME}-cli"
    command = ("template", "build", "-f", "Dockerfile", ".", "--name", name, "--build-arg", "WHO=you", "--ready-cmd", "ss -Htln | grep -q 8080")
    done = nidus(daemon, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{name} is ready" in done.stdout and "RUN echo $GREETING" in done.stderr and "EXPOSE has no meaning" in done.stderr
    with Sandbox.create(name, timeout=300, **sandboxes.options(daemon)) as sandbox:
        out = sandbox.commands.run("cat /app/greeting /app/listing; curl -s localhost:8080/app.py; stat -c '%a %U' /app/app.py; pwd; whoami; echo $PATH | cut -d: -f1-2").stdout
        assert out == "hello you\napp.py\ngreeting\nlisting\nprint('from the image')\n755 root\n/app\nuser\n/app:/usr/local/sbin\n"
    again = nidus(daemon, *command, "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["name"] == name
    (tmp_path / "Dockerfile").write_text("FROM debian:bookworm\nRUN echo looking; false\n")
    bad = nidus(daemon, "template", "build", "--name", f"{name}-bad", cwd=tmp_path)
    assert bad.returncode == 1 and "in step 3" in bad.stderr and "looking" in bad.stderr, bad.stderr
    [shell] = [line for line in bad.stderr.splitlines() if "nidus sandbox create" in line]
    made = nidus(daemon, "sandbox", "create", shell.split()[-1].rstrip(")"))
    assert made.returncode == 0, made.stderr
    assert nidus(daemon, "sandbox", "kill", made.stdout.strip()).returncode == 0
    (tmp_path / "Dockerfile").write_text("FROM debian:bookworm\nONBUILD RUN x\n")
    wrong = nidus(daemon, "template", "build", "--name", f"{name}-bad", cwd=tmp_path)
    assert wrong.returncode == 1 and "Dockerfile line 2: 'ONBUILD' is no instruction" in wrong.stderr
    delete(daemon, name)


def test_kill_9_in_a_build_leaves_nothing_and_it_can_be_started_again(make_daemon, host):
    daemon = make_daemon().start()
    daemon.create_key()
    seed = random.Random(os.environ.get("NIDUS_TEST_SEED", "6"))
    for n in range(ROUNDS):
        template = slow(n)
        moment = seed.uniform(0.05, 3.0)
        failed = []

        def run(template=template, failed=failed, daemon=daemon):
            try:
                build(daemon, template)
            except Exception as error:  # noqa: BLE001 the daemon is killed under it
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(moment)  # the moment is what is tried
        daemon.kill9()
        thread.join()
        daemon = make_daemon().start()
        daemon.create_key()
        assert list(work().iterdir()) == []
        rows = [b for t in sandboxes.call(daemon, "GET", "/templates") if NAME in t["names"] for b in sandboxes.call(daemon, "GET", f"/templates/{t['templateID']}")["builds"]]
        assert all(b["status"] in ("ready", "error", "waiting") for b in rows), rows
        lines = build(daemon, template)
        assert sum(line.startswith(("DONE", "CACHED")) for line in lines) == 4, (moment, lines)
        with Sandbox.create(NAME, timeout=60, **sandboxes.options(daemon)) as sandbox:
            assert sandbox.commands.run("cat /tmp/a; stat -c %s /tmp/b").stdout == f"{n}\n20971520\n"
    delete(daemon)
    sandboxes.call(daemon, "POST", "/admin/layers/prune", {"maxBytes": 0})
    assert daemon.terminate() == 0
    host.assert_clean()


def test_a_build_of_a_template_that_is_deleted_ends(daemon, host):
    options = sandboxes.options(daemon)
    info = Template.build_in_background(Template().from_template("base").run_cmd("sleep 1000"), f"{NAME}-long", **options)
    running = lambda: "sleep 1000" in sandboxes.call(daemon, "GET", f"/templates/{info.template_id}/builds/{info.build_id}/status")["logs"][-1]  # noqa: E731
    wait_for("the step to run", running, 60)
    began = time.monotonic()
    sandboxes.call(daemon, "DELETE", f"/templates/{info.template_id}")
    assert time.monotonic() - began < 20
    assert list(work().iterdir()) == []
    assert "sleep 1000" not in subprocess.run(["pgrep", "-fa", "qemu-system"], capture_output=True, text=True).stdout
    host_builds = {p.name for p in (DEFAULT_DATA_DIR / "storage").iterdir()}
    assert info.build_id not in host_builds


def test_two_builds_of_the_same_make_each_layer_once(daemon):
    mark = uuid.uuid4().hex
    make = lambda: Template().from_template("base").run_cmd(f"echo {mark} > /tmp/m; sleep 1")  # noqa: E731
    said = []

    def run(name):
        said.extend(build(daemon, make(), name))

    threads = [threading.Thread(target=run, args=(f"{NAME}-twin{n}",)) for n in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sum(line.startswith("DONE") for line in said) == 2, said
    assert sum(line.startswith("CACHED") for line in said) == 2, said
    delete(daemon, f"{NAME}-twin")


def nidus(daemon, *arguments, cwd=None):
    return daemon.cli(*arguments, cwd=cwd, env=daemon.sdk_env(), timeout=300)


def test_layers_are_pruned_and_what_templates_read_stays(daemon):
    nidus(daemon, "template", "prune")
    garbage = lambda: {g["buildID"] for g in sandboxes.call(daemon, "GET", "/admin/garbage?graceSeconds=0")["garbage"]}  # noqa: E731
    # Builds that were stored when a daemon was killed, before they were noted as layers.
    before = garbage()
    name = f"{NAME}-prune"
    build(daemon, Template().from_template("base").run_cmd(f"head -c 8M /dev/urandom > /home/user/x; sync; : {NAME}"), name)
    kept = nidus(daemon, "template", "prune", "--json")
    # Its template reads them.
    assert json.loads(kept.stdout)["removedLayers"] == 0, kept.stdout
    with Sandbox.create(name, timeout=60, **sandboxes.options(daemon)) as sandbox:
        assert sandbox.commands.run("stat -c %s /home/user/x").stdout == "8388608\n"
    assert garbage() == before
    delete(daemon, name)
    pruned = json.loads(nidus(daemon, "template", "prune", "--json").stdout)
    assert pruned["removedLayers"] >= 2 and pruned["removedBytes"] > 8 << 20, pruned
    assert garbage() == before
    with pytest.raises(BuildException):
        build(daemon, Template().from_template(name))
    delete(daemon)
