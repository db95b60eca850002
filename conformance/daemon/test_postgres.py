"""The daemon with its state on a real Postgres server: the main jobs, and what outlives a restart and a kill."""

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from e2b import Sandbox, Secret, Template, Volume
from support import sandboxes
from support.daemon import INHERIT


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """URL of a database on a server of its own, which listens on a socket only."""
    if INHERIT and not Path("/usr/lib/postgresql").is_dir():
        pytest.skip("there is no Postgres in the test bed")
    versions = sorted(Path("/usr/lib/postgresql").iterdir(), key=lambda p: int(p.name))
    programs = versions[-1] / "bin"
    home = Path(f"/tmp/nidus-postgres-{uuid.uuid4().hex[:8]}")
    home.mkdir()
    shutil.chown(home, "postgres")
    user = pwd.getpwnam("postgres")
    run = lambda *command, **options: subprocess.run(  # noqa: E731
        [str(programs / command[0]), *command[1:]], user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, capture_output=True, text=True, **options)
    made = run("initdb", "--auth", "trust", "--no-sync", "--encoding", "UTF8", "-D", str(home / "data"))
    assert made.returncode == 0, made.stderr
    started = run("pg_ctl", "-D", str(home / "data"), "-w", "-l", str(home / "log"), "-o", f"-k {home} -c listen_addresses= -c fsync=off", "start")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        assert run("createdb", "-h", str(home), "nidus").returncode == 0
        def sql(text):
            done = run("psql", "-h", str(home), "-v", "ON_ERROR_STOP=1", "-q", "nidus", input=text)
            assert done.returncode == 0, done.stderr

        yield SimpleNamespace(url=f"postgres://postgres@localhost/nidus?host={home}", sql=sql)
    finally:
        run("pg_ctl", "-D", str(home / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(home)


def bring_base(daemon, sql):
    """Tells the new database of the base template that the data directory has: building it once more takes a minute."""
    team = json.loads(daemon.cli("team", "list", "--json").stdout)[0]["id"]
    known = sqlite3.connect(f"file:{daemon.data_dir}/nidus.db?mode=ro", uri=True)
    base = known.execute("SELECT template_id FROM aliases WHERE alias = 'base'").fetchone()[0]
    quoted = lambda v: "NULL" if v is None else str(v) if isinstance(v, int) else "'" + v.replace("'", "''") + "'"  # noqa: E731
    for table, column in (("templates", "id"), ("aliases", "template_id"), ("builds", "template_id"), ("tags", "template_id")):
        rows = known.execute(f"SELECT * FROM {table} WHERE {column} = ?", [base])
        names = [c[0] for c in rows.description]
        for row in rows.fetchall():
            values = [team if n == "team_id" else v for n, v in zip(names, row)]
            sql(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(map(quoted, values))});")
    known.close()


def test_the_main_jobs_and_what_outlives_the_daemon(make_daemon, postgres, host):
    env = {"NIDUS_DATABASE": postgres.url}
    daemon = make_daemon(extra_env=env)
    bring_base(daemon, postgres.sql)
    daemon.start()
    daemon.create_key()
    options = sandboxes.options(daemon)
    name = f"pg-{uuid.uuid4().hex[:8]}"
    sandbox = Sandbox.create(timeout=300, metadata={"k": "v"}, **options)
    sandbox.files.write("/home/user/kept", "kept")
    sandboxes.build(daemon, Template().from_template("base").run_cmd("echo made > /home/user/made"), name)
    sandboxes.call(daemon, "POST", "/templates/tags", {"target": name, "tags": ["v1"]})
    snapshot = sandbox.create_snapshot(**options)
    Secret.create(name, "value", **options)
    volume = Volume.create(name, **options)
    sandbox.pause(**options)
    assert [s.sandbox_id for s in Sandbox.list(**options).next_items()] == [sandbox.sandbox_id]
    daemon.kill9()
    daemon = make_daemon(extra_env=env).start()
    daemon.create_key()
    options = sandboxes.options(daemon)
    again = Sandbox.connect(sandbox.sandbox_id, timeout=300, **options)
    assert again.files.read("/home/user/kept") == "kept" and again.get_info(**options).metadata == {"k": "v"}
    with Sandbox.create(f"{name}:v1", timeout=60, **options) as made:
        assert made.commands.run("cat /home/user/made").stdout == "made\n"
    with Sandbox.create(snapshot.snapshot_id, timeout=60, **options) as made:
        assert made.files.read("/home/user/kept") == "kept"
    assert Secret.get_info(name, **options).version == 1
    assert Volume.get_info(volume.volume_id, **options).name == name
    teams = daemon.cli("team", "list", "--json")
    assert teams.returncode == 0 and "default" in teams.stdout
    Sandbox.delete_snapshot(snapshot.snapshot_id, **options)
    Volume.destroy(volume.volume_id, **options)
    again.kill(**options)
    sandboxes.delete_templates(daemon, name)
    assert daemon.terminate() == 0
    host.assert_clean()


def test_a_server_that_cannot_be_reached_is_one_clear_sentence(make_daemon):
    daemon = make_daemon(extra_env={"NIDUS_DATABASE": "postgres://nobody@127.0.0.1:1/x"})
    done = daemon.cli("key", "list")
    assert done.returncode == 1 and "database server" in done.stderr and "nobody" not in done.stderr, done.stderr
    done = daemon.cli("key", "list", env={"NIDUS_DATABASE": "mysql://x"})
    assert done.returncode == 1 and "postgres://" in done.stderr
