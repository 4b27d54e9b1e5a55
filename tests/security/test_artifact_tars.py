"""Artifacts that were packed to do harm, at both who read them: the registry and the pool agent."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from libs import artifact_tar
from libs.artifact_tar import MAX_FILES, MAX_PADDING_BYTES
from libs.errors import InvalidArgument
from services.pool_agent.archive import ArtifactRefused, unpack
from services.registry.manifest import read_manifest

MANIFEST = json.dumps({"kind": "embedding", "dimensions": 4, "max_input_tokens": 8}).encode()
GOOD = {"config.pbtxt": b'backend: "python"', "headrace.json": MANIFEST, "1/model.py": b"code"}
LIMIT_BYTES = 100_000
GIB = 1024**3


def member(name: str, content: bytes = b"", **fields: object) -> bytes:
    """Returns a header and its content, padded."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def packed(*members: bytes) -> bytes:
    """Returns a tar of good files and more members."""
    return b"".join([*(member(*file) for file in GOOD.items()), *members, bytes(1024)])


def pax(**values: str) -> bytes:
    """Returns a pax header for the next member."""
    records = b""
    for key, value in values.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(rest)
        while length != len(str(length)) + len(rest):
            length = len(str(length)) + len(rest)
        records += str(length).encode() + rest
    return member("pax", records, type=tarfile.XHDTYPE)


def long_name(name: bytes) -> bytes:
    return member("././@LongLink", name + b"\0", type=tarfile.GNUTYPE_LONGNAME)


def header_only(size: int, kind: bytes, name: str = "x") -> bytes:
    """Returns a header that announces more than follows."""
    return member(name, type=kind, size=size)


BAD = {
    "absolute": (member("/tmp/evil"), "leads out"),  # noqa: S108  # it must not be written there
    "parent": (member("1/../../evil"), "leads out"),
    "parent in pax": (pax(path="../evil") + member("a"), "leads out"),
    "parent in a long name": (long_name(b"../" * 50 + b"evil") + member("a"), "leads out"),
    "no name": (member(""), "leads out"),
    "dot": (member("."), "leads out"),
    "symbolic link": (member("a", type=tarfile.SYMTYPE, linkname="/etc"), "a symbolic link"),
    "hard link": (member("a", type=tarfile.LNKTYPE, linkname="config.pbtxt"), "a hard link"),
    "pipe": (member("a", type=tarfile.FIFOTYPE), "a pipe"),
    "character device": (member("a", type=tarfile.CHRTYPE), "a device"),
    "block device": (member("a", type=tarfile.BLKTYPE), "a device"),
    "sparse": (member("a", type=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "sparse in pax": (pax(GNU__sparse__major="1") + member("a"), "GNU.sparse.major"),
    "size in pax": (pax(size="1000000000000") + member("a"), "'size'"),
    "charset in pax": (pax(hdrcharset="BINARY") + member("a"), "'hdrcharset'"),
    "other type": (member("a", type=b"Z"), "not a regular file"),
    "setuid": (member("a", mode=0o4755), "another user"),
    "setgid": (member("a", mode=0o2755), "another user"),
    "twice": (member("1/model.py"), "twice"),
    "twice with a dot": (member("./1/./model.py"), "twice"),
    "other case": (member("1/MODEL.py"), "case only"),
    "other case of a folder": (member("CONFIG.pbtxt/a"), "and a file at"),
    "composed otherwise": (member("é") + member("e\u0301"), "twice"),
    "file below a file": (member("config.pbtxt/a"), "and a file at"),
    "file at a folder": (member("1"), "twice"),
    "control characters": (member("a\nb"), "control characters"),
    "text direction": (member("a\u202eb"), "control characters"),
    "backslash": (member("..\\evil"), "backslashes"),
    "long name": (long_name(b"a/" * 1000 + b"b") + member("a"), "a path of more"),
    "long part": (long_name(b"a" * 300) + member("a"), "a path of more"),
    "deep": (member("/".join("a" * 20)), "a path of more"),
    "not UTF-8": (long_name(b"\xff") + member("a"), "not UTF-8"),
    "huge pax header": (header_only(4 * GIB, tarfile.XHDTYPE), "cut off"),
    "large pax header": (member("a", bytes(100_000), type=tarfile.XHDTYPE), "a header of"),
    "large long name": (member("a", b"a" * 100_000, type=tarfile.GNUTYPE_LONGNAME), "a header of"),
    "huge file": (header_only(8 * GIB, tarfile.REGTYPE), "cut off"),
    "malformed pax": (member("a", b"7 path=", type=tarfile.XHDTYPE), "malformed pax"),
    "endless pax": (member("a", b"0 path=a\n", type=tarfile.XHDTYPE), "malformed pax"),
    "many headers": (pax(path="a") * (4 * MAX_FILES), "headers"),
    "many files": (b"".join(member(f"f/{n}") for n in range(MAX_FILES)), "files"),
    "damaged": (b"x" * 512, "no valid header"),
}


def read(tar: bytes, _folder: Path) -> None:
    """Reads as the registry does."""
    read_manifest(io.BytesIO(tar))


def write(tar: bytes, folder: Path) -> None:
    """Unpacks as the pool agent does."""
    path = folder / "artifact.tar"
    path.write_bytes(tar)
    unpack(path, folder / "deep" / "out", limit_bytes=LIMIT_BYTES)


Reader = Callable[[bytes, Path], None]
READERS = pytest.mark.parametrize("reader", [read, write])


@READERS
@pytest.mark.parametrize(("bad", "text"), BAD.values(), ids=BAD)
def test_an_artifact_packed_to_do_harm_is_refused(tmp_path, reader, bad, text):
    """With a reason, before anything is written, and with little memory."""
    tar = packed(bad)
    tracemalloc.start()
    try:
        with pytest.raises((InvalidArgument, ArtifactRefused)) as raised:
            reader(tar, tmp_path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text in str(raised.value)
    assert len(str(raised.value)) < 400
    assert peak_bytes < 16_000_000
    assert {found.name for found in tmp_path.rglob("*")} <= {"artifact.tar"}


@READERS
@pytest.mark.parametrize("more", [b"x", b"x" * 512, bytes(MAX_PADDING_BYTES + 512)])
def test_nothing_may_follow_the_end(tmp_path, reader, more):
    """Another reader could find other files there."""
    with pytest.raises((InvalidArgument, ArtifactRefused), match="after its end"):
        reader(packed() + more, tmp_path)


@READERS
def test_a_tar_without_an_end_is_refused(tmp_path, reader):
    """It was cut off between two files."""
    with pytest.raises((InvalidArgument, ArtifactRefused), match="no end"):
        reader(packed()[:-1024], tmp_path)


def test_files_that_are_too_large_together_are_refused_before_they_are_written(tmp_path):
    """The limit is that of the artifact."""
    half = bytes(LIMIT_BYTES // 2)
    with pytest.raises(ArtifactRefused, match="more than"):
        write(packed(member("a", half), member("b", half)), tmp_path)
    assert not (tmp_path / "deep").exists()


def test_an_artifact_must_not_have_the_agents_own_file(tmp_path):
    """It says which files were verified."""
    with pytest.raises(ArtifactRefused, match=r"\.headrace\.json"):
        write(packed(member(".Headrace.json", b"{}")), tmp_path)


@READERS
@pytest.mark.parametrize(
    "tar",
    [
        packed(member("1", type=tarfile.DIRTYPE, mode=0o2755)),
        packed(pax(path="1/ñ" * 6, mtime="1.5", LIBARCHIVE__xattr__a="b") + member("a")),
        packed(long_name(b"1/" + b"n" * 200) + member("a")),
        packed() + bytes(10_240),
        packed(member("g", b"13 comment=c\n", type=tarfile.XGLTYPE)),
    ],
    ids=["folder", "pax", "long name", "padding", "comment"],
)
def test_what_usual_programs_write_is_accepted(tmp_path, reader, tar):
    """Folders, long and other names, padding."""
    reader(tar, tmp_path)


@READERS
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_python_are_accepted(tmp_path, reader, form):
    """With times, owners and folders of real files."""
    folder = tmp_path / "model"
    for name, content in {**GOOD, "1/" + "long" * 24: b"x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        tar.add(folder, arcname=".")
    shutil.rmtree(folder)
    reader(made.getvalue(), tmp_path)


@READERS
@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "oldgnu", "v7"])
def test_tars_of_gnu_tar_are_accepted(tmp_path, reader, form):
    """The program that most people use."""
    folder = tmp_path / "model"
    for name, content in GOOD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    done = subprocess.run(
        ["tar", "-c", f"--format={form}", "-C", folder, "."], check=True, capture_output=True
    )
    shutil.rmtree(folder)
    reader(done.stdout, tmp_path)


def test_the_bytes_of_each_file_are_those_in_the_tar(tmp_path):
    """Whatever headers precede them."""
    name = "1/" + "n" * 200
    tar = packed(long_name(name.encode()) + member("a", b"content"))
    write(tar, tmp_path)
    assert (tmp_path / "deep" / "out" / name).read_bytes() == b"content"
    found = {str(file.path): file.size_bytes for file in artifact_tar.tar_files(io.BytesIO(tar))}
    assert found == {**{key: len(text) for key, text in GOOD.items()}, name: 7}
