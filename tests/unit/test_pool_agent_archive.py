"""Artifacts on the agent's disk: unpacked safely, either complete or absent."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from services.pool_agent.archive import ArtifactRefused, unpack
from services.pool_agent.domain import Kind, Wanted
from services.pool_agent.repository import ModelRepository

LIMIT_BYTES = 1_000_000
WANTED = Wanted("alpha", "1.0.0", "sha256:" + "ab" * 32, Kind.EMBEDDING)
GOOD = {"config.pbtxt": b'backend: "python"', "1/model.py": b"code", "1/weights": b"w" * 1000}


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def pack(folder: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    path = folder / "artifact.tar"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # the mode is a string
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def good(folder: Path) -> Path:
    return pack(folder, *(member(name, content) for name, content in GOOD.items()))


def test_files_are_unpacked_with_their_digests(tmp_path):
    """Regular files that Triton can read, whatever their modes in the tar."""
    path = pack(
        tmp_path,
        member("1", type=tarfile.DIRTYPE),
        *(member(name, content, mode=0o1777) for name, content in GOOD.items()),
    )
    digests = unpack(path, tmp_path / "out", limit_bytes=LIMIT_BYTES)
    assert set(digests) == set(GOOD)
    for name, content in GOOD.items():
        assert (tmp_path / "out" / name).read_bytes() == content
        assert (tmp_path / "out" / name).stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../evil", {}),
        ("1/../../evil", {}),
        ("/tmp/evil", {}),  # noqa: S108  # it must not be written there
        ("1/link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("1/link", {"type": tarfile.LNKTYPE, "linkname": "config.pbtxt"}),
        ("1/pipe", {"type": tarfile.FIFOTYPE}),
        ("1/device", {"type": tarfile.CHRTYPE}),
        ("config.pbtxt", {}),
        ("config.pbtxt/below", {}),
    ],
)
def test_only_regular_files_in_the_folder_are_accepted(tmp_path, name, fields):
    """No paths out of the folder, links, devices, or two files of one path."""
    path = pack(tmp_path, member("config.pbtxt", GOOD["config.pbtxt"]), member(name, b"", **fields))
    with pytest.raises(ArtifactRefused):
        unpack(path, tmp_path / "deep" / "out", limit_bytes=LIMIT_BYTES)
    assert not [found for found in tmp_path.rglob("*") if "evil" in found.name]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not a tar at all", "is not an uncompressed tar"),
        (b"", "is not an uncompressed tar"),
    ],
)
def test_other_files_than_tars_are_refused(tmp_path, content, text):
    """The error says why."""
    path = tmp_path / "artifact.tar"
    path.write_bytes(content)
    with pytest.raises(ArtifactRefused, match=text):
        unpack(path, tmp_path / "out", limit_bytes=LIMIT_BYTES)


def test_a_truncated_tar_is_refused(tmp_path):
    """Its digest would be wrong, too; unpacking does not rely on it."""
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArtifactRefused):
        unpack(path, tmp_path / "out", limit_bytes=LIMIT_BYTES)


def test_a_compressed_tar_is_refused(tmp_path):
    """A small file may contain a huge one."""
    path = pack(tmp_path, member("config.pbtxt", b"0" * 100_000), mode="w:gz")
    with pytest.raises(ArtifactRefused, match="uncompressed"):
        unpack(path, tmp_path / "out", limit_bytes=LIMIT_BYTES)


def test_an_artifact_that_is_too_large_or_has_no_configuration_is_refused(tmp_path):
    """Both would fail later, with a worse message."""
    with pytest.raises(ArtifactRefused, match="more than"):
        unpack(good(tmp_path), tmp_path / "out", limit_bytes=500)
    path = pack(tmp_path, member("1/model.py", b"code"))
    with pytest.raises(ArtifactRefused, match=r"config\.pbtxt"):
        unpack(path, tmp_path / "out2", limit_bytes=LIMIT_BYTES)


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    made = ModelRepository(tmp_path / "models", limit_bytes=LIMIT_BYTES)
    made.open()
    return made


def install(repository: ModelRepository, tmp_path: Path) -> Path:
    good(tmp_path).rename(repository.download_path(WANTED))
    repository.install(WANTED, repository.download_path(WANTED))
    return tmp_path / "models" / WANTED.backend_model


def test_an_installed_version_is_found_and_can_be_removed(repository, tmp_path):
    """The download is removed once it is unpacked."""
    folder = install(repository, tmp_path)
    assert repository.has(WANTED)
    assert repository.names() == {WANTED.backend_model}
    assert not repository.download_path(WANTED).exists()
    repository.remove(WANTED.backend_model)
    assert not folder.exists()
    assert not repository.has(WANTED)
    assert repository.names() == frozenset()


@pytest.mark.parametrize("damage", ["change", "remove", "record", "digest"])
def test_a_damaged_version_is_not_found(repository, tmp_path, damage):
    """A changed file, a missing one, no record, the record of another artifact."""
    folder = install(repository, tmp_path)
    record = folder / ".headrace.json"
    match damage:
        case "change":
            (folder / "1" / "weights").write_bytes(b"W" * 1000)
        case "remove":
            (folder / "1" / "weights").unlink()
        case "record":
            record.write_text("{")
        case _:
            record.write_text(record.read_text().replace("ab" * 32, "cd" * 32))
    assert not repository.has(WANTED)


@pytest.mark.parametrize("name", ["config.pbtxt", "libtriton_x.so"])
def test_a_version_that_an_earlier_agent_allowed_is_not_found(repository, tmp_path, name):
    """Its files are as recorded, but Triton would run code of it outside the sandbox."""
    folder = install(repository, tmp_path)
    record = json.loads((folder / ".headrace.json").read_text())
    content = b'backend: "x"'
    (folder / name).write_bytes(content)
    record["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / ".headrace.json").write_text(json.dumps(record))
    assert not repository.has(WANTED)


def test_what_a_killed_agent_left_is_removed_at_the_start(repository, tmp_path):
    """Downloads and folders that were not complete."""
    repository.download_path(WANTED).write_bytes(b"half")
    (tmp_path / "models" / ".incoming" / WANTED.backend_model).mkdir()
    repository.open()
    assert not list((tmp_path / "models" / ".incoming").iterdir())


def test_a_refused_artifact_leaves_nothing(repository, tmp_path):
    """Neither a folder that Triton could load nor a file that fills the disk."""
    repository.download_path(WANTED).write_bytes(b"not a tar")
    with pytest.raises(ArtifactRefused):
        repository.install(WANTED, repository.download_path(WANTED))
    assert not list((tmp_path / "models" / ".incoming").iterdir())
    assert repository.names() == frozenset()
