"""Create, list, look at, prolong, connect to and kill sandboxes through the official Python SDK."""

import time
import uuid
from datetime import datetime, timedelta, timezone

import pytest
from e2b import (
    AuthenticationException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    SandboxQuery,
    SandboxState,
)
from support.checks import assert_error_body
from support.daemon import wait_for


def now():
    return datetime.now(timezone.utc)


def ids(paginator):
    found = []
    while paginator.has_next:
        found += [info.sandbox_id for info in paginator.next_items()]
    return found


def test_create_with_envs_and_metadata(new_sandbox):
    metadata = {"user": "žluťoučký kůň", "a b": "x=1&y=2 %41 +", "empty": ""}
    before = now()
    sandbox = new_sandbox(envs={"TOKEN": "s3 cr'et", "UNI": "ž"}, metadata=metadata, timeout=120)
    after = now()
    assert sandbox.commands.run('echo "$TOKEN|$UNI"').stdout == "s3 cr'et|ž\n"
    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id
    assert info.metadata == metadata
    assert info.state == SandboxState.RUNNING
    assert info.name == "base" and info.template_id
    assert info.cpu_count >= 1 and info.memory_mb >= 128
    slack = timedelta(seconds=2)
    assert before - slack <= info.started_at <= after + slack
    assert timedelta(seconds=118) <= info.end_at - info.started_at <= timedelta(seconds=122)
    assert sandbox.is_running()


def test_create_by_template_name_and_id(new_sandbox):
    by_name = new_sandbox(template="base")
    by_id = new_sandbox(template=by_name.get_info().template_id)
    assert by_id.commands.run("echo same").stdout == "same\n"


def test_sandboxes_have_the_usual_environment(new_sandbox):
    sandbox = new_sandbox()
    out = sandbox.commands.run('echo "$E2B_SANDBOX $E2B_SANDBOX_ID"').stdout
    assert out == f"true {sandbox.sandbox_id}\n"


def test_list_with_filters_and_pages(new_sandbox):
    run = uuid.uuid4().hex
    made = []
    for n in range(3):
        made.append(new_sandbox(metadata={"run": run, "number": str(n), "odd": "a&b=c d/ž"}).sandbox_id)

    def query(**filters):
        return SandboxQuery(metadata={"run": run}, **filters)

    assert set(ids(Sandbox.list(query()))) == set(made)
    assert ids(Sandbox.list(SandboxQuery(metadata={"run": run, "number": "1"}))) == [made[1]]
    assert ids(Sandbox.list(SandboxQuery(metadata={"run": run, "odd": "a&b=c d/ž"}, state=[SandboxState.RUNNING])))
    assert ids(Sandbox.list(SandboxQuery(metadata={"run": uuid.uuid4().hex}))) == []
    assert ids(Sandbox.list(query(state=[SandboxState.PAUSED]))) == []
    assert set(ids(Sandbox.list(query(template="base")))) == set(made)
    assert ids(Sandbox.list(query(template="no-such-template"))) == []
    assert ids(Sandbox.list(query(started_after=now() + timedelta(minutes=5)))) == []
    assert set(ids(Sandbox.list(query(started_after=now() - timedelta(minutes=5))))) == set(made)

    oldest_first = ids(Sandbox.list(query(), order="asc"))
    assert oldest_first == made
    assert ids(Sandbox.list(query(), order="desc")) == made[::-1]

    pages = Sandbox.list(query(), limit=2)
    first = pages.next_items()
    assert len(first) == 2 and pages.has_next
    second = pages.next_items()
    assert len(second) == 1 and not pages.has_next
    assert {i.sandbox_id for i in first + second} == set(made)
    assert {i.metadata["run"] for i in first + second} == {run}


def test_set_timeout_and_the_end(new_sandbox):
    """The sandbox lives to its end time, and not past it."""
    sandbox = new_sandbox(timeout=600)
    sandbox.set_timeout(6)
    end = sandbox.get_info().end_at
    assert abs((end - now()).total_seconds() - 6) < 4
    last_seen_alive = None
    deadline = time.monotonic() + 40
    while sandbox.is_running():
        last_seen_alive = now()
        assert time.monotonic() < deadline, "it outlived its end time"
        time.sleep(0.25)
    gone = now()
    assert last_seen_alive is not None
    assert gone >= end - timedelta(seconds=1), "it was killed before its end time"
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()


def test_the_timeout_of_create_kills(new_sandbox):
    sandbox = new_sandbox(timeout=3)
    wait_for("the sandbox to end by itself", lambda: not sandbox.is_running(), 40, every=0.25)
    assert sandbox.kill() is False


def test_set_timeout_prolongs(new_sandbox):
    sandbox = new_sandbox(timeout=30)
    first = sandbox.get_info().end_at
    sandbox.set_timeout(300)
    assert sandbox.get_info().end_at - first > timedelta(seconds=200)


def test_connect_to_a_running_one(new_sandbox):
    sandbox = new_sandbox(envs={"KEPT": "yes"}, metadata={"m": "1"}, timeout=300)
    sandbox.files.write("/home/user/note", "left here")
    end = sandbox.get_info().end_at
    other = Sandbox.connect(sandbox.sandbox_id)
    assert other.sandbox_id == sandbox.sandbox_id
    assert other.files.read("/home/user/note") == "left here"
    assert other.commands.run("echo $KEPT").stdout == "yes\n"
    assert other.get_info().metadata == {"m": "1"}
    Sandbox.connect(sandbox.sandbox_id, timeout=10)
    assert other.get_info().end_at >= end - timedelta(seconds=1), "connecting never shortens a life"
    other.connect(timeout=900)
    assert other.get_info().end_at > end + timedelta(seconds=300)


def test_kill_and_what_is_left(new_sandbox, api):
    sandbox = new_sandbox()
    sandbox_id = sandbox.sandbox_id
    assert sandbox.commands.run("echo alive").stdout == "alive\n"
    assert sandbox.kill() is True
    assert sandbox.is_running() is False
    assert sandbox.kill() is False
    assert Sandbox.kill(sandbox_id) is False
    assert sandbox_id not in ids(Sandbox.list())
    for call in (sandbox.get_info, lambda: sandbox.set_timeout(60), lambda: Sandbox.connect(sandbox_id)):
        with pytest.raises(SandboxNotFoundException):
            call()
    with pytest.raises(SandboxNotRunningException):
        sandbox.commands.run("echo ghost")
    with pytest.raises(SandboxNotRunningException):
        sandbox.files.read("/etc/hostname")
    for method, path, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/timeout", {"timeout": 60}),
        ("POST", "/refreshes", {"duration": 60}),
        ("POST", "/connect", {"timeout": 60}),
    ):
        message = assert_error_body(api.request(method, f"/sandboxes/{sandbox_id}{path}", json=body), 404)
        assert sandbox_id in message, (method, path, message)
    assert_error_body(api.post(f"/v2/sandboxes/{sandbox_id}/connect", json={"timeout": 60}), 404)


def test_killing_ends_a_running_command_with_a_clear_error(new_sandbox):
    sandbox = new_sandbox()
    handle = sandbox.commands.run("echo up; sleep 600", background=True, timeout=0)
    events = iter(handle)
    assert next(events)[0] == "up\n"
    assert Sandbox.kill(sandbox.sandbox_id) is True
    with pytest.raises(SandboxNotRunningException):
        for _ in events:
            pass


def test_context_manager_kills(new_sandbox):
    with new_sandbox() as sandbox:
        assert sandbox.is_running()
    assert not sandbox.is_running()


def test_a_wrong_key_is_an_authentication_error():
    for key in ("e2b_" + "0" * 40, "nonsense"):
        with pytest.raises(AuthenticationException):
            Sandbox.create(api_key=key)


def test_an_unknown_template_is_named():
    with pytest.raises((SandboxException, NotFoundException)) as caught:
        Sandbox.create(template="no-such-template")
    assert "no-such-template" in str(caught.value)


def test_an_unknown_sandbox():
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect("inosuchsandbox000000")
    assert Sandbox.kill("inosuchsandbox000000") is False


def test_a_creation_that_is_asked_for_twice_is_one(api):
    key = f"once-{uuid.uuid4()}"
    made = Sandbox.create(timeout=60, metadata={"once": key}, idempotency_key=key)
    try:
        again = Sandbox.create(timeout=60, metadata={"once": key}, idempotency_key=key)
        assert again.sandbox_id == made.sandbox_id and again.commands.run("echo same").stdout == "same\n"
        assert len(Sandbox.list(SandboxQuery(metadata={"once": key})).next_items()) == 1
        other = api.post("/v2/sandboxes", json={"templateID": "base", "timeout": 61}, headers={"Idempotency-Key": key})
        assert other.status_code == 422, other.text
        assert api.post("/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": "Not One"}).status_code == 400
        failed = {"templateID": f"none-{key}"}
        for _ in range(2):
            assert api.post("/v2/sandboxes", json=failed, headers={"Idempotency-Key": f"{key}-f"}).status_code == 404
    finally:
        made.kill()
