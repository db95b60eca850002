"""The builder's steps that need programs which the base template has not: npm, bun, and E2B's dev containers."""

import io
import json
import os
import shutil
import tarfile
import uuid

import httpx
import pytest
from e2b import BuildException, Sandbox, Template
from support import interpreter, node_packages

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("NIDUS_TESTBED") == "1", reason="no packages to make the templates of in the test bed's machine"),
]


@pytest.fixture
def named():
    made = []

    def name(wanted=None):
        made.append(wanted or f"builder-{uuid.uuid4().hex[:8]}")
        return made[-1]

    yield name
    for n in made:
        httpx.delete(f"{os.environ['E2B_API_URL']}/templates/{n}", headers={"X-API-Key": os.environ["E2B_API_KEY"]})


def tiny(path):
    """A package for node of one file."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("package.json", json.dumps({"name": "tiny", "version": "1.0.0"})), ("index.js", "module.exports = 'tiny'")):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))


@pytest.mark.skipif(not os.environ.get("NIDUS_WRITE_TABLES"), reason="minutes of copying and npm under emulation: run when the tables are made")
def test_npm_and_bun_install_packages(named, tmp_path):
    interpreter.template()
    shutil.copytree(node_packages.packages() / "npm" / "package", tmp_path / "npm")
    shutil.copy(node_packages.packages() / "bun" / "package" / "bin" / "bun", tmp_path / "bun")
    tiny(tmp_path / "tiny.tgz")
    name = named()
    template = (
        Template(file_context_path=str(tmp_path)).from_template(interpreter.NAME).set_user("root")
        .copy("npm", "/opt/npm").copy("bun", "/usr/local/bin/bun", mode=0o755).copy("tiny.tgz", "/opt/tiny.tgz")
        .run_cmd("ln -s /opt/npm/bin/npm-cli.js /usr/local/bin/npm && chmod 755 /opt/npm/bin/npm-cli.js")
        # Nobody is there to be asked for audits and news.
        .set_envs({f"npm_config_{name}": "false" for name in ("audit", "fund", "update_notifier")})
        .set_user("user").set_workdir("/home/user/app").npm_install("/opt/tiny.tgz")
        .set_workdir("/home/user/bun-app").bun_install("/opt/tiny.tgz")
        .set_start_cmd("sleep 100000", "true")
    )
    Template.build(template, name, cpu_count=1, memory_mb=1024)
    with Sandbox.create(name, timeout=300) as sandbox:
        said = sandbox.commands.run(
            "for d in app bun-app; do (cd /home/user/$d && node -p 'require(\"tiny\")' && grep -c tiny package.json); done", timeout=120)
        assert said.stdout == "tiny\n1\ntiny\n1\n"


def test_dev_containers_are_steps_for_a_program_of_the_template(named, tmp_path):
    """E2B's `devcontainer` template has Docker in it. What the server is asked for are a step and a start command, which are
    tried with a template of that name whose program writes down what it is told."""
    (tmp_path / "devcontainer").write_text("#!/bin/sh\necho \"$(id -un): $*\" >> /told\nchmod 666 /told\n")
    (tmp_path / "prepare-exec.sh").write_text("#!/bin/sh\necho \"cd $1\"\n")
    base = (
        Template(file_context_path=str(tmp_path)).from_template("base").set_user("root")
        .copy("devcontainer", "/usr/local/bin/devcontainer", mode=0o755).copy("prepare-exec.sh", "/prepare-exec.sh", mode=0o755)
    )
    Template.build(base, named("devcontainer"), cpu_count=1, memory_mb=512)
    name = named()
    template = (
        Template().from_template("devcontainer").set_user("user").make_dir("/home/user/my project")
        .beta_dev_container_prebuild("/home/user/my project").beta_set_dev_container_start("/home/user/my project")
    )
    Template.build(template, name, cpu_count=1, memory_mb=512)
    with Sandbox.create(name, timeout=120) as sandbox:
        assert sandbox.commands.run("cat /told /devcontainer.sh; test -x /devcontainer.sh; ls /devcontainer.up").stdout == (
            "root: build --workspace-folder /home/user/my project\nroot: up --workspace-folder /home/user/my project\n"
            "cd /home/user/my project\n/devcontainer.up\n")
    # In another template, the SDK itself says no.
    with pytest.raises(BuildException):
        Template().from_template("base").beta_dev_container_prebuild("/x")
