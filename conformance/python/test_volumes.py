"""Volumes by the SDK: made, filled, listed, changed, emptied and destroyed."""

import hashlib
import io
import os
import uuid

import httpx
import pytest
from e2b import AsyncVolume, NotFoundException, Volume, VolumeException, VolumeFileType, VolumeNotFoundException
from support.teams import new_team


@pytest.fixture(scope="module")
def volume():
    volume = Volume.create(f"v-{uuid.uuid4().hex[:8]}")
    yield volume
    assert Volume.destroy(volume.volume_id)


@pytest.fixture
def folder(volume):
    path = f"/t-{uuid.uuid4().hex[:8]}"
    volume.make_dir(path)
    return path


def test_a_volumes_life():
    name = f"v-{uuid.uuid4().hex[:8]}"
    made = Volume.create(name)
    assert made.name == name and made.token
    with pytest.raises(VolumeException):
        Volume.create(name)
    assert (name, made.volume_id) in [(v.name, v.volume_id) for v in Volume.list()]
    assert Volume.get_info(made.volume_id).token == made.token
    made.write_file("/kept", "kept")
    assert Volume.connect(made.volume_id).read_file("/kept") == "kept"
    assert Volume.destroy(made.volume_id) is True
    assert Volume.destroy(made.volume_id) is False
    for gone in (lambda: Volume.connect(made.volume_id), lambda: Volume.get_info(made.volume_id)):
        with pytest.raises(VolumeNotFoundException):
            gone()
    with pytest.raises(NotFoundException):
        made.read_file("/kept")


def test_files(volume, folder):
    written = volume.write_file(f"{folder}/a", "one", mode=0o600, uid=1000, gid=1001)
    assert (written.name, written.path, written.size) == ("a", f"{folder}/a", 3)
    assert (written.type, written.mode, written.uid, written.gid) == (VolumeFileType.FILE, 0o600, 1000, 1001)
    with pytest.raises(VolumeException):
        volume.write_file(f"{folder}/a", "two")
    volume.write_file(f"{folder}/a", b"\x00\xfftwo", force=True)
    assert bytes(volume.read_file(f"{folder}/a", format="bytes")) == b"\x00\xfftwo"
    assert volume.exists(f"{folder}/a") and not volume.exists(f"{folder}/b")
    with pytest.raises(NotFoundException):
        volume.read_file(f"{folder}/b")
    with pytest.raises(NotFoundException):
        volume.write_file(f"{folder}/no/b", "")
    with pytest.raises(VolumeException):
        volume.read_file(folder)
    changed = volume.update_metadata(f"{folder}/a", mode=0o640, uid=5)
    assert (changed.mode, changed.uid, changed.gid) == (0o640, 5, 0)
    volume.remove(f"{folder}/a")
    with pytest.raises(NotFoundException):
        volume.remove(f"{folder}/a")
    with pytest.raises(NotFoundException):
        volume.update_metadata(f"{folder}/a", mode=0o600)


def test_directories(volume, folder):
    made = volume.make_dir(f"{folder}/x/y", force=True, mode=0o700)
    assert (made.type, made.mode) == (VolumeFileType.DIRECTORY, 0o700)
    with pytest.raises(NotFoundException):
        volume.make_dir(f"{folder}/p/q")
    with pytest.raises(VolumeException):
        volume.make_dir(f"{folder}/x")
    for name in ("one", "two"):
        volume.write_file(f"{folder}/x/y/{name}", name)
    names = lambda path, **options: [e.path.removeprefix(folder) for e in volume.list(path, **options)]
    assert names(folder) == ["/x"]
    assert names(folder, depth=3) == ["/x", "/x/y", "/x/y/one", "/x/y/two"]
    with pytest.raises(NotFoundException):
        volume.list(f"{folder}/none")
    for depth in (0, 1000):
        with pytest.raises(VolumeException):
            volume.list(folder, depth=depth)
    volume.remove(f"{folder}/x")
    assert names(folder) == []
    with pytest.raises(VolumeException):
        volume.remove("/")
    assert volume.get_info("/").type == VolumeFileType.DIRECTORY


def test_large_files_are_streamed_and_exact(volume, folder):
    piece = os.urandom(1 << 20)
    whole = hashlib.sha256(piece * 64).hexdigest()
    volume.write_file(f"{folder}/large", io.BytesIO(piece * 64))
    seen = hashlib.sha256()
    for chunk in volume.read_file(f"{folder}/large", format="stream"):
        seen.update(chunk)
    assert seen.hexdigest() == whole
    volume.write_file(f"{folder}/empty", "")
    assert volume.read_file(f"{folder}/empty") == ""


def test_an_upload_that_breaks_off_leaves_the_old_file(volume, folder):
    volume.write_file(f"{folder}/f", "old")

    def body():
        yield b"new"
        raise RuntimeError("the client dies")

    with pytest.raises(RuntimeError):
        httpx.put(
            f"{os.environ['E2B_VOLUME_API_URL']}/volumecontent/{volume.volume_id}/file",
            params={"path": f"{folder}/f", "force": "true"},
            headers={"Authorization": f"Bearer {volume.token}"},
            content=body(),
        )
    assert volume.read_file(f"{folder}/f") == "old"
    assert [e.name for e in volume.list(folder)] == ["f"]


async def test_the_async_sdk():
    volume = await AsyncVolume.create(f"v-{uuid.uuid4().hex[:8]}")
    try:
        await volume.make_dir("/d")
        await volume.write_file("/d/f", "text")
        again = await AsyncVolume.connect(volume.volume_id)
        assert await again.read_file("/d/f") == "text"
        assert [e.name for e in await again.list("/d")] == ["f"]
        assert (await again.get_info("/d/f")).size == 4
        assert (await again.update_metadata("/d/f", mode=0o600)).mode == 0o600
        assert await again.exists("/d/f")
        await again.remove("/d")
        assert not await again.exists("/d/f")
        assert volume.volume_id in [v.volume_id for v in await AsyncVolume.list()]
        assert (await AsyncVolume.get_info(volume.volume_id)).name == volume.name
    finally:
        assert await AsyncVolume.destroy(volume.volume_id)


def test_tokens_open_their_volume_only(volume, folder):
    volume.write_file(f"{folder}/f", "mine")
    other = Volume.create(f"v-{uuid.uuid4().hex[:8]}")
    try:
        url = f"{os.environ['E2B_VOLUME_API_URL']}/volumecontent/{volume.volume_id}/file"
        for token in (other.token, "", "x" * 64, os.environ["E2B_API_KEY"]):
            answer = httpx.get(url, params={"path": f"{folder}/f"}, headers={"Authorization": f"Bearer {token}".strip()})
            assert answer.status_code == 401 and "mine" not in answer.text, token
        assert httpx.get(url, params={"path": f"{folder}/f"}).status_code == 401
    finally:
        Volume.destroy(other.volume_id)
    with new_team().client() as theirs:
        assert theirs.get(f"/volumes/{volume.volume_id}").status_code == 404
        assert theirs.delete(f"/volumes/{volume.volume_id}").status_code == 404
        assert theirs.get("/volumes").json() == []


def test_paths_do_not_lead_out(volume, folder):
    for path in ("/../../../etc/passwd", "../../etc/passwd", f"{folder}/../../../../etc/passwd"):
        with pytest.raises(NotFoundException):
            volume.read_file(path)
    volume.write_file(f"{folder}/../../../in", "stays in")
    assert volume.read_file("/in") == "stays in"
    volume.remove("/in")
    for path in ("", "a\0b", "x" * 300, "a/" * 129, "y" * 5000):
        with pytest.raises(Exception):
            volume.get_info(path)
