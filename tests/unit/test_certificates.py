"""The authority and the certificates of a mesh."""

from __future__ import annotations

import ssl
import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typing_extensions import override

from deploy import certificates
from deploy.certificates import NAMES, VALID, ensure_certificates, tls_files, tls_folder
from deploy.keys import KeyFileError
from libs.clock import SystemClock
from libs.tls import MESH_NAME, TlsFiles


class At(SystemClock):
    """A clock that stands still."""

    def __init__(self, now: datetime) -> None:
        self._now = now

    @override
    def now(self) -> datetime:
        return self._now


def contents(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tls_folder(home).iterdir()}


def handshake(server: TlsFiles, client: TlsFiles) -> None:
    """Connects a client to a server in memory, and sends a byte each way.

    Raises:
        ssl.SSLError: one of them refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.client_context().wrap_bio(to_client, to_server, server_hostname=MESH_NAME)
    two = server.server_context().wrap_bio(to_server, to_client, server_side=True)
    for side in (one, two, one, two):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    two.write(b"x")
    assert one.read(1) == b"x"


def test_they_are_made_once(tmp_path: Path):
    """Another start changes nothing, and nobody else can read them."""
    ensure_certificates(tmp_path)
    before = contents(tmp_path)
    ensure_certificates(tmp_path)
    assert contents(tmp_path) == before
    assert set(before) == {"ca.pem", "ca.key"} | {
        f"{name}.{kind}" for name in NAMES for kind in ("pem", "key")
    }
    for path in tls_folder(tmp_path).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_services_accept_each_other(tmp_path: Path):
    """As servers and as clients."""
    ensure_certificates(tmp_path)
    handshake(tls_files(tmp_path, "registry"), tls_files(tmp_path, "router"))
    handshake(tls_files(tmp_path, "triton"), tls_files(tmp_path, "inference"))


@pytest.mark.parametrize("name", ["triton", "nats"])
def test_what_is_only_called_is_no_caller(tmp_path: Path, name: str):
    """Triton runs code of others; its certificate opens no service."""
    ensure_certificates(tmp_path)
    with pytest.raises(ssl.SSLError):
        handshake(tls_files(tmp_path, "registry"), tls_files(tmp_path, name))


@pytest.mark.parametrize("name", ["envoy", "operator"])
def test_what_only_calls_is_no_server(tmp_path: Path, name: str):
    """The edge's certificate cannot be used in a service's place."""
    ensure_certificates(tmp_path)
    with pytest.raises(ssl.SSLError):
        handshake(tls_files(tmp_path, name), tls_files(tmp_path, "router"))


def test_another_mesh_is_a_stranger(tmp_path: Path):
    """Each has an authority of its own."""
    for name in ("a", "b"):
        ensure_certificates(tmp_path / name)
    with pytest.raises(ssl.SSLError):
        handshake(tls_files(tmp_path / "a", "registry"), tls_files(tmp_path / "b", "router"))


def test_they_are_renewed_in_their_last_half_year(tmp_path: Path):
    """A start makes new ones; the authority stays."""
    ensure_certificates(tmp_path)
    before = contents(tmp_path)
    soon = SystemClock().now() + VALID - certificates.RENEW_BEFORE - timedelta(days=1)
    ensure_certificates(tmp_path, clock=At(soon))
    assert contents(tmp_path) == before
    ensure_certificates(tmp_path, clock=At(soon + timedelta(days=2)))
    after = contents(tmp_path)
    assert after["ca.pem"] == before["ca.pem"]
    assert after["router.pem"] != before["router.pem"]


def test_a_new_authority_signs_all_again(tmp_path: Path):
    """Near its end, or where its files were deleted."""
    ensure_certificates(tmp_path)
    (tls_folder(tmp_path) / "ca.pem").unlink()
    ensure_certificates(tmp_path)
    handshake(tls_files(tmp_path, "registry"), tls_files(tmp_path, "router"))
    authority = x509.load_pem_x509_certificate((tls_folder(tmp_path) / "ca.pem").read_bytes())
    end = authority.not_valid_after_utc
    ensure_certificates(tmp_path, clock=At(end - timedelta(days=30)))
    renewed = x509.load_pem_x509_certificate((tls_folder(tmp_path) / "ca.pem").read_bytes())
    assert renewed.not_valid_after_utc > end


@pytest.mark.parametrize("replaced", ["ca.key", "ca.pem"])
def test_an_authority_whose_files_do_not_belong_together_is_made_again(
    tmp_path: Path, replaced: str
):
    """A crash between the two writes leaves one of them new."""
    for name in ("mesh", "other"):
        ensure_certificates(tmp_path / name)
    new = (tls_folder(tmp_path / "other") / replaced).read_bytes()
    (tls_folder(tmp_path / "mesh") / replaced).write_bytes(new)
    (tls_folder(tmp_path / "mesh") / "router.pem").unlink()  # which the authority signs next
    ensure_certificates(tmp_path / "mesh")
    handshake(tls_files(tmp_path / "mesh", "registry"), tls_files(tmp_path / "mesh", "router"))
    before = contents(tmp_path / "mesh")
    ensure_certificates(tmp_path / "mesh")
    assert contents(tmp_path / "mesh") == before


def test_a_second_authority_in_the_file_stays(tmp_path: Path):
    """Both are trusted while one replaces the other."""
    for name in ("mesh", "old"):
        ensure_certificates(tmp_path / name)
    file = tls_folder(tmp_path / "mesh") / "ca.pem"
    both = (tls_folder(tmp_path / "old") / "ca.pem").read_bytes() + file.read_bytes()
    file.write_bytes(both)
    before = contents(tmp_path / "mesh")
    ensure_certificates(tmp_path / "mesh")
    assert contents(tmp_path / "mesh") == before


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path):
    """The message says what to do."""
    ensure_certificates(tmp_path)
    (tls_folder(tmp_path) / "ca.pem").write_text("x")
    with pytest.raises(KeyFileError, match="delete the folder"):
        ensure_certificates(tmp_path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path):
    """It may have been copied."""
    ensure_certificates(tmp_path)
    (tls_folder(tmp_path) / "ca.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="other users can read it"):
        ensure_certificates(tmp_path)
