"""How the edge's certificate gets to where Envoy reads it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from deploy.local.edge_certificate import install, installed
from tests.support.certificates import Authority


@pytest.fixture(name="authority")
def new_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def _write(folder: Path, certificate: bytes, key: bytes) -> tuple[Path, Path]:
    files = folder / "certificate.pem", folder / "key.pem"
    for file, data in zip(files, (certificate, key), strict=True):
        file.write_bytes(data)
    return files


def test_certificate_and_key_are_replaced_together(tmp_path: Path, authority: Authority) -> None:
    """One link changes; nobody else may read the copies, and old ones are removed."""
    folder = tmp_path / "tls"
    for _ in range(2):
        certificate, key = authority.issue(names=("edge.example",))
        files = _write(tmp_path, certificate, key)
        assert install(*files, folder)
        assert [file.read_bytes() for file in installed(folder)] == [certificate, key]
        assert not install(*files, folder)  # unchanged
    assert stat.S_IMODE(installed(folder)[1].stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 4  # three links and one folder


def test_what_does_not_belong_together_replaces_nothing(
    tmp_path: Path, authority: Authority
) -> None:
    """While only one of the two files has been renewed, the edge has the old ones."""
    folder = tmp_path / "tls"
    certificate, key = authority.issue(names=("edge.example",))
    install(*_write(tmp_path, certificate, key), folder)
    other, _ = authority.issue(names=("edge.example",))
    for bad in (other, b"no PEM"):
        with pytest.raises(ValueError, match="do not belong together"):
            install(*_write(tmp_path, bad, key), folder)
    assert installed(folder)[0].read_bytes() == certificate
    assert len(list(folder.iterdir())) == 4  # three links and one folder


def test_an_expired_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    """No client would accept it."""
    files = _write(tmp_path, *authority.issue(names=("edge.example",), valid_hours=-0.5))
    with pytest.raises(ValueError, match="the certificate expired on"):
        install(*files, tmp_path / "tls")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(ValueError, match=r"none\.pem: No such file"):
        install(tmp_path / "none.pem", tmp_path / "none.pem", tmp_path / "tls")
