"""The node's SandboxService, called as E2B's own API server calls it: gRPC, no API in between."""

import importlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from support.daemon import wait_for


@pytest.fixture(scope="module")
def node(shared_daemon, generated):
    """(messages, stub) of the node."""
    messages, services = generated
    with grpc.insecure_channel(shared_daemon.node_addr) as channel:
        yield messages, services.SandboxServiceStub(channel)


@pytest.fixture(scope="module")
def delete_build(shared_daemon, generated):
    """Deletes a build on the node."""
    messages = importlib.import_module("template_manager_pb2")
    services = importlib.import_module("template_manager_pb2_grpc")
    with grpc.insecure_channel(shared_daemon.node_addr) as channel:
        stub = services.TemplateServiceStub(channel)
        yield lambda build: stub.TemplateBuildDelete(messages.TemplateBuildDeleteRequest(buildID=build))


@pytest.fixture(scope="module")
def template_config(shared_daemon, node):
    """The configuration that our own API sends for a sandbox of `base`, read back with List."""
    status, made = shared_daemon.rest("POST", "/sandboxes", {"templateID": "base", "timeout": 60})
    assert status == 201, made
    _, stub = node
    running = [s for s in stub.List(Empty()).sandboxes if s.config.sandbox_id == made["sandboxID"]]
    assert len(running) == 1
    status, _ = shared_daemon.rest("DELETE", f"/sandboxes/{made['sandboxID']}")
    assert status == 204
    return running[0].config


def request(messages, template_config, seconds, **changes):
    config = messages.SandboxConfig()
    config.CopyFrom(template_config)
    config.sandbox_id = "i" + uuid.uuid4().hex[:19]
    config.execution_id = str(uuid.uuid4())
    config.ClearField("env_vars")
    config.ClearField("metadata")
    for name, value in changes.items():
        field = getattr(config, name)
        field.update(value) if isinstance(value, dict) else setattr(config, name, value)
    create = messages.SandboxCreateRequest(sandbox=config)
    create.start_time.GetCurrentTime()
    create.end_time.FromMilliseconds(int((time.time() + seconds) * 1000))
    return create


def listed(stub):
    return {sandbox.config.sandbox_id: sandbox for sandbox in stub.List(Empty()).sandboxes}


def test_create_list_update_delete(node, template_config):
    messages, stub = node
    create = request(messages, template_config, 120, metadata={"who": "grpc"}, env_vars={"A": "b"})
    answer = stub.Create(create)
    assert answer.client_id
    sandbox_id = create.sandbox.sandbox_id
    sandbox = listed(stub)[sandbox_id]
    assert sandbox.config.metadata == {"who": "grpc"}
    assert sandbox.config.build_id == template_config.build_id
    assert sandbox.client_id == answer.client_id
    assert abs(sandbox.end_time.ToMilliseconds() - create.end_time.ToMilliseconds()) < 1000

    update = messages.SandboxUpdateRequest(sandbox_id=sandbox_id)
    update.end_time.FromMilliseconds(create.end_time.ToMilliseconds() + 100_000)
    stub.Update(update)
    assert abs(listed(stub)[sandbox_id].end_time.ToMilliseconds() - update.end_time.ToMilliseconds()) < 1000

    stub.Delete(messages.SandboxDeleteRequest(sandbox_id=sandbox_id))
    assert sandbox_id not in listed(stub)


def test_the_node_alone_ends_a_sandbox_at_its_time(node, template_config):
    """No API asks for it: the node keeps the end time itself."""
    messages, stub = node
    create = request(messages, template_config, 5)
    stub.Create(create)
    sandbox_id = create.sandbox.sandbox_id
    assert sandbox_id in listed(stub)
    wait_for("the node to end the sandbox", lambda: sandbox_id not in listed(stub), 30, every=0.1)
    assert time.time() >= create.end_time.ToMilliseconds() / 1000 - 0.5, "it ended too early"


def test_an_update_brings_the_end_nearer(node, template_config):
    messages, stub = node
    create = request(messages, template_config, 600)
    stub.Create(create)
    sandbox_id = create.sandbox.sandbox_id
    update = messages.SandboxUpdateRequest(sandbox_id=sandbox_id)
    update.end_time.FromMilliseconds(int((time.time() + 2) * 1000))
    stub.Update(update)
    wait_for("the node to end the sandbox", lambda: sandbox_id not in listed(stub), 30, every=0.1)


def status_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_what_is_not_there(node, template_config):
    messages, stub = node
    code, details = status_of(lambda: stub.Delete(messages.SandboxDeleteRequest(sandbox_id="inosuch")))
    assert code == grpc.StatusCode.NOT_FOUND and "inosuch" in details
    update = messages.SandboxUpdateRequest(sandbox_id="inosuch")
    update.end_time.GetCurrentTime()
    assert status_of(lambda: stub.Update(update))[0] == grpc.StatusCode.NOT_FOUND
    missing = str(uuid.uuid4())
    code, details = status_of(lambda: stub.Create(request(messages, template_config, 60, build_id=missing)))
    assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION) and missing in details


@pytest.mark.parametrize("changes", [{"sandbox_id": ""}, {"sandbox_id": "../../x"}, {"build_id": "../../etc"}, {"build_id": ""}], ids=repr)
def test_broken_requests(node, template_config, changes):
    messages, stub = node
    create = request(messages, template_config, 60, **changes)
    assert status_of(lambda: stub.Create(create))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert status_of(lambda: stub.Create(messages.SandboxCreateRequest()))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_the_same_id_twice(node, template_config):
    messages, stub = node
    create = request(messages, template_config, 60)
    stub.Create(create)
    try:
        assert status_of(lambda: stub.Create(create))[0] == grpc.StatusCode.ALREADY_EXISTS
        assert create.sandbox.sandbox_id in listed(stub)
    finally:
        stub.Delete(messages.SandboxDeleteRequest(sandbox_id=create.sandbox.sandbox_id))


def test_checkpoint(node, delete_build, template_config):
    messages, stub = node
    create = request(messages, template_config, 120)
    stub.Create(create)
    sandbox_id, build_id = create.sandbox.sandbox_id, str(uuid.uuid4())
    checkpoint = messages.SandboxCheckpointRequest(sandbox_id=sandbox_id, build_id=build_id)
    said = stub.Checkpoint(checkpoint).scheduling_metadata
    assert said.build_id == build_id and build_id in said.memfile_build_ids
    assert said.memfile_base_build_id == template_config.build_id
    assert sandbox_id in listed(stub), "it runs on"
    assert status_of(lambda: stub.Checkpoint(checkpoint))[0] == grpc.StatusCode.ALREADY_EXISTS
    for changes, code in (({"sandbox_id": "inosuch"}, "NOT_FOUND"), ({"build_id": "../x"}, "INVALID_ARGUMENT")):
        broken = messages.SandboxCheckpointRequest(**{"sandbox_id": sandbox_id, "build_id": str(uuid.uuid4())} | changes)
        assert status_of(lambda broken=broken: stub.Checkpoint(broken))[0].name == code
    child = request(messages, template_config, 120, build_id=build_id, snapshot=True)
    stub.Create(child)
    # Not while the child runs from it, and then it goes.
    assert status_of(lambda: delete_build(build_id))[0] == grpc.StatusCode.FAILED_PRECONDITION
    for sandbox in (sandbox_id, child.sandbox.sandbox_id):
        stub.Delete(messages.SandboxDeleteRequest(sandbox_id=sandbox))
    delete_build(build_id)
    assert status_of(lambda: delete_build(build_id))[0] == grpc.StatusCode.NOT_FOUND


def test_pause_of_the_disk_alone(node, delete_build, template_config):
    messages, stub = node
    create = request(messages, template_config, 300)
    # The template has a memory, which is left out.
    create.filesystem_boot = True
    assert stub.Create(create).filesystem_boot_applied is True
    create.ClearField("filesystem_boot")
    sandbox_id, build_id = create.sandbox.sandbox_id, str(uuid.uuid4())
    pause = messages.SandboxPauseRequest(
        sandbox_id=sandbox_id, template_id=template_config.template_id, build_id=build_id, filesystem_only=True)
    said = stub.Pause(pause).scheduling_metadata
    assert (list(said.memfile_build_ids), said.memfile_base_build_id) == ([], "")
    assert build_id in said.rootfs_build_ids and said.rootfs_base_build_id == template_config.build_id
    # Two at once, each in a memory of its own.
    children = [request(messages, template_config, 300, build_id=build_id, snapshot=True) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(stub.Create, children))
    assert [a.filesystem_boot_applied for a in answers] == [True, True]
    # Each can be stored and resumed again; what it stores of its memory begins with that build.
    for child in children:
        mine, again = str(uuid.uuid4()), child.sandbox.sandbox_id
        said = stub.Pause(messages.SandboxPauseRequest(
            sandbox_id=again, template_id=template_config.template_id, build_id=mine)).scheduling_metadata
        assert (list(said.memfile_build_ids), said.memfile_base_build_id) == ([mine], mine)
        assert said.rootfs_base_build_id == template_config.build_id
        child.sandbox.build_id = mine
        assert stub.Create(child).filesystem_boot_applied is False
        stub.Delete(messages.SandboxDeleteRequest(sandbox_id=again))
        delete_build(mine)
    delete_build(build_id)


def test_artifacts_for_other_nodes(shared_daemon, generated, template_config):
    """What E2B's nodes ask of the one that made a build, on the same port as everything else."""
    messages = importlib.import_module("chunks_pb2")
    services = importlib.import_module("chunks_pb2_grpc")
    build = template_config.build_id
    files = shared_daemon.data_dir / "storage" / build
    with grpc.insecure_channel(shared_daemon.node_addr) as channel:
        stub = services.ChunkServiceStub(channel)

        def read(name, offset, length, build_id=build):
            request = messages.ReadAtBuildSeekableRequest(build_id=build_id, name=name, offset=offset, length=length)
            return list(stub.ReadAtBuildSeekable(request))

        for name in ("memfile", "rootfs.ext4"):
            size = stub.GetBuildFileSize(messages.GetBuildFileSizeRequest(build_id=build, name=name))
            assert size.total_size == (files / name).stat().st_size and not size.HasField("availability")
            offset, length = size.total_size // 2 - 3, 5_000_001
            parts = read(name, offset, length)
            with (files / name).open("rb") as file:
                file.seek(offset)
                assert b"".join(part.data for part in parts) == file.read(length)
            assert len(parts) > 1 and max(len(part.data) for part in parts) <= 1 << 20
            assert status_of(lambda: read(name, size.total_size - 1, 2))[0] == grpc.StatusCode.OUT_OF_RANGE
        for name in ("snapfile", "metadata.json", "memfile.header", "rootfs.ext4.header"):
            exists = stub.GetBuildFileExists(messages.GetBuildFileExistsRequest(build_id=build, name=name))
            assert not exists.HasField("availability")
            blob = stub.GetBuildBlob(messages.GetBuildBlobRequest(build_id=build, name=name))
            assert b"".join(part.data for part in blob) == (files / name).read_bytes()

        (answer,) = read("memfile", 0, 4096, build_id=str(uuid.uuid4()))
        assert answer.availability.not_available and not answer.data
        for name in ("../../key", "/etc/passwd", "checksums", "snapfile", ""):
            assert status_of(lambda: read(name, 0, 1))[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert status_of(lambda: read("memfile", 0, 1, build_id="../x"))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_health_over_http_on_the_same_port(shared_daemon):
    import httpx

    answer = httpx.get(f"http://{shared_daemon.node_addr}/health")
    assert answer.status_code == 200
    assert answer.json()["status"].lower() == "healthy"
