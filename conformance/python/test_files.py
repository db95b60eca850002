"""The files module through the official Python SDK."""

import hashlib
import io
import random
import time

import pytest
from e2b import AuthenticationException, FileNotFoundException, FileType, InvalidArgumentException

ODD_NAMES = [
    "with space.txt",
    "  leading and trailing  ",
    "žluťoučký kůň 🦀.txt",
    "e\u0301 decomposed",
    "quote's \"double\" `back`.txt",
    "100%25 %2F %.txt",
    "hash#mark?question&and=eq;semi+plus.txt",
    "line\nbreak",
    "tab\tand\\backslash",
    "-rf",
    "--help",
    "~tilde",
    "$HOME ${x} $(id)",
    "*glob?[a-z]",
    "...",
    ".hidden",
    "n" * 255,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[repr(n)[:24] for n in ODD_NAMES])
def test_odd_names(sbx, folder, name):
    path = f"{folder}/{name}"
    text = f"content of {name}"
    info = sbx.files.write(path, text)
    assert (info.name, info.path, info.type) == (name, path, FileType.FILE)
    assert sbx.files.read(path) == text
    assert sbx.files.exists(path)
    assert sbx.files.get_info(path).name == name
    assert [entry.name for entry in sbx.files.list(folder)] == [name]
    moved = sbx.files.rename(path, f"{folder}/plain")
    assert moved.name == "plain"
    sbx.files.rename(f"{folder}/plain", path)
    sbx.files.remove(path)
    assert not sbx.files.exists(path)


def test_a_name_that_is_too_long_is_an_error_and_nothing_else(sbx, folder):
    with pytest.raises(Exception) as caught:
        sbx.files.write(f"{folder}/{'n' * 256}", "x")
    assert "too long" in str(caught.value).lower()
    assert sbx.is_running()


@pytest.fixture(scope="module")
def ten_mebibytes():
    return random.Random(2).randbytes(10 << 20)


def test_ten_mebibytes(sbx, folder, ten_mebibytes):
    sbx.files.write(f"{folder}/big.bin", ten_mebibytes)
    out = sbx.commands.run(f"sha256sum < {folder}/big.bin").stdout
    assert out.split()[0] == hashlib.sha256(ten_mebibytes).hexdigest()
    assert bytes(sbx.files.read(f"{folder}/big.bin", format="bytes")) == ten_mebibytes
    digest = hashlib.sha256()
    with sbx.files.read(f"{folder}/big.bin", format="stream") as stream:
        for piece in stream:
            digest.update(piece)
    assert digest.hexdigest() == hashlib.sha256(ten_mebibytes).hexdigest()
    assert sbx.files.get_info(f"{folder}/big.bin").size == 10 << 20


def test_ten_mebibytes_streamed_up(sbx, folder, ten_mebibytes):
    sbx.files.write(f"{folder}/io.bin", io.BytesIO(ten_mebibytes))
    pieces = (ten_mebibytes[i : i + 100_000] for i in range(0, len(ten_mebibytes), 100_000))
    sbx.files.write(f"{folder}/iter.bin", pieces)
    sbx.commands.run(f"cmp {folder}/io.bin {folder}/iter.bin")
    assert bytes(sbx.files.read(f"{folder}/iter.bin", format="bytes")) == ten_mebibytes


def test_octet_stream_and_gzip_uploads_and_gzip_download(sbx, folder):
    text = "přesně tohle\n" * 5000
    sbx.files.write(f"{folder}/octet", text, use_octet_stream=True)
    sbx.files.write(f"{folder}/gzip", text, gzip=True)
    assert sbx.files.read(f"{folder}/octet") == text
    assert sbx.files.read(f"{folder}/gzip") == text
    assert sbx.files.read(f"{folder}/gzip", gzip=True) == text


@pytest.mark.parametrize("data", ["", b"", b"\x00\xff\r\n--boundary\r\n", "text", "ž"], ids=repr)
def test_small_contents_are_exact(sbx, folder, data):
    sbx.files.write(f"{folder}/f", data)
    expected = data.encode() if isinstance(data, str) else data
    assert bytes(sbx.files.read(f"{folder}/f", format="bytes")) == expected


def test_overwriting_shortens(sbx, folder):
    sbx.files.write(f"{folder}/f", "a long first content")
    sbx.files.write(f"{folder}/f", "short")
    assert sbx.files.read(f"{folder}/f") == "short"


def test_write_files(sbx, folder):
    infos = sbx.files.write_files([
        {"path": f"{folder}/a", "data": "A"},
        {"path": f"{folder}/new/dir/b", "data": b"\x00B"},
        {"path": f"{folder}/c d", "data": io.BytesIO(b"C")},
    ])
    assert [info.path for info in infos] == [f"{folder}/a", f"{folder}/new/dir/b", f"{folder}/c d"]
    assert sbx.files.read(f"{folder}/a") == "A"
    assert bytes(sbx.files.read(f"{folder}/new/dir/b", format="bytes")) == b"\x00B"
    assert sbx.files.read(f"{folder}/c d") == "C"
    assert sbx.files.write_files([]) == []


def test_write_files_multipart(sbx, folder):
    infos = sbx.files.write_files(
        [{"path": f"{folder}/{n}", "data": f"number {n}"} for n in ("1", "dva ž", "3 \"q\"")],
    )
    assert [info.name for info in infos] == ["1", "dva ž", "3 \"q\""]
    assert [sbx.files.read(info.path) for info in infos] == ["number 1", "number dva ž", "number 3 \"q\""]


def test_relative_paths_and_users(sbx, folder):
    name = folder.rsplit("/", 1)[1]
    info = sbx.files.write(f"{name}/rel.txt", "mine")
    assert info.path == f"{folder}/rel.txt"
    assert sbx.files.read(f"~/{name}/rel.txt") == "mine"
    assert sbx.commands.run(f"stat -c %U:%G:%a {folder} {folder}/rel.txt").stdout.splitlines() == [
        "user:user:755",
        "user:user:644",
    ]
    root = sbx.files.write(f"{name}-root.txt", "roots", user="root")
    assert root.path == f"/root/{name}-root.txt"
    assert sbx.files.get_info(root.path, user="root").owner == "root"


def test_an_unknown_user_is_refused(sbx, folder):
    with pytest.raises((AuthenticationException, InvalidArgumentException)):
        sbx.files.write(f"{folder}/f", "x", user="nobody-by-this-name")
    with pytest.raises((AuthenticationException, InvalidArgumentException)):
        sbx.files.list("/", user="nobody-by-this-name")


def test_get_info(sbx, folder):
    before = time.time()
    sbx.files.write(f"{folder}/f", "12345")
    sbx.commands.run(f"chmod 640 {folder}/f; ln -s f {folder}/link; ln -s nowhere {folder}/broken; mkfifo {folder}/pipe")
    info = sbx.files.get_info(f"{folder}/f")
    assert (info.name, info.type, info.path, info.size) == ("f", FileType.FILE, f"{folder}/f", 5)
    assert (info.mode & 0o777, info.permissions, info.owner, info.group) == (0o640, "-rw-r-----", "user", "user")
    assert before - 3 <= info.modified_time.timestamp() <= time.time() + 3
    assert info.symlink_target is None
    assert sbx.files.get_info(f"{folder}/link").symlink_target in ("f", f"{folder}/f")
    folder_info = sbx.files.get_info(folder)
    assert folder_info.type == FileType.DIR and folder_info.permissions.startswith("d")
    assert sbx.files.exists(f"{folder}/pipe")


def test_list(sbx, folder):
    sbx.commands.run(f"mkdir -p {folder}/a/b/c {folder}/d; touch {folder}/f {folder}/a/g {folder}/a/b/h {folder}/a/b/c/i; ln -s f {folder}/l")

    def names(depth):
        return {entry.path.removeprefix(f"{folder}/") for entry in sbx.files.list(folder, depth=depth)}

    assert names(1) == {"a", "d", "f", "l"}
    assert names(2) == {"a", "d", "f", "l", "a/b", "a/g"}
    assert names(4) == {"a", "d", "f", "l", "a/b", "a/g", "a/b/c", "a/b/h", "a/b/c/i"}
    kinds = {entry.name: entry.type for entry in sbx.files.list(folder)}
    assert (kinds["a"], kinds["f"]) == (FileType.DIR, FileType.FILE)
    assert sbx.files.list(f"{folder}/d") == []
    with pytest.raises(InvalidArgumentException):
        sbx.files.list(folder, depth=0)


def test_list_of_what_is_no_folder(sbx, folder):
    sbx.files.write(f"{folder}/f", "")
    with pytest.raises(InvalidArgumentException):
        sbx.files.list(f"{folder}/f")
    with pytest.raises(FileNotFoundException):
        sbx.files.list(f"{folder}/missing")


def test_make_dir(sbx, folder):
    assert sbx.files.make_dir(f"{folder}/x/y z/ž") is True
    assert sbx.files.get_info(f"{folder}/x/y z/ž").type == FileType.DIR
    assert sbx.files.make_dir(f"{folder}/x/y z/ž") is False, "it is there already"
    sbx.files.write(f"{folder}/file", "")
    with pytest.raises(InvalidArgumentException):
        sbx.files.make_dir(f"{folder}/file")


def test_rename(sbx, folder):
    sbx.files.write(f"{folder}/a", "A")
    moved = sbx.files.rename(f"{folder}/a", f"{folder}/b")
    assert (moved.name, moved.path, moved.type) == ("b", f"{folder}/b", FileType.FILE)
    assert not sbx.files.exists(f"{folder}/a") and sbx.files.read(f"{folder}/b") == "A"
    sbx.files.write(f"{folder}/c", "C")
    sbx.files.rename(f"{folder}/c", f"{folder}/b")
    assert sbx.files.read(f"{folder}/b") == "C", "an existing target is replaced"
    sbx.files.make_dir(f"{folder}/d")
    sbx.files.rename(f"{folder}/d", f"{folder}/e")
    assert sbx.files.get_info(f"{folder}/e").type == FileType.DIR
    with pytest.raises(FileNotFoundException):
        sbx.files.rename(f"{folder}/missing", f"{folder}/z")


def test_remove(sbx, folder):
    sbx.files.write(f"{folder}/d/e/f", "x")
    sbx.files.remove(f"{folder}/d")
    assert not sbx.files.exists(f"{folder}/d")
    sbx.files.remove(f"{folder}/d")  # removing what is not there is no error


def test_what_is_missing(sbx, folder):
    assert sbx.files.exists(f"{folder}/nothing") is False
    for call in (sbx.files.read, sbx.files.get_info):
        with pytest.raises(FileNotFoundException):
            call(f"{folder}/nothing")
    for format in ("bytes", "stream"):
        with pytest.raises(FileNotFoundException):
            sbx.files.read(f"{folder}/nothing", format=format)


def test_a_folder_is_no_file(sbx, folder):
    sbx.files.make_dir(folder)
    with pytest.raises(InvalidArgumentException):
        sbx.files.read(folder)
    with pytest.raises(InvalidArgumentException):
        sbx.files.write(folder, "x")


def test_files_and_commands_see_the_same(sbx, folder):
    sbx.files.write(f"{folder}/script.py", "import sys; print(sys.argv[1:], sum(range(10)))")
    assert sbx.commands.run(f"python3 {folder}/script.py 'a b'").stdout == "['a b'] 45\n"
    sbx.commands.run(f"printf 'made by a command' > {folder}/made")
    assert sbx.files.read(f"{folder}/made") == "made by a command"
