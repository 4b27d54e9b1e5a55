"""Copies the edge's certificate to where Envoy reads it, at the start and whenever it changes.

Envoy notices files that are renamed, but not files that are written in place, nor links that are
replaced, as certbot does. This also checks that certificate and key belong together, and gives
Envoy both in one step. Runs as a separate process next to an edge with TLS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import ssl
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

CERTIFICATE_FILE = "certificate.pem"
KEY_FILE = "key.pem"
POLL_SECONDS = 1.0
_CURRENT = "current"


def installed(folder: Path) -> tuple[Path, Path]:
    """Returns where Envoy reads certificate and key."""
    return folder / CERTIFICATE_FILE, folder / KEY_FILE


def install(certificate_file: Path, key_file: Path, folder: Path) -> bool:
    """Copies certificate and key into a folder; returns whether they differ from those before.

    Raises:
        ValueError: a file cannot be read, or they do not belong together.
    """
    try:
        content = {CERTIFICATE_FILE: certificate_file.read_bytes(), KEY_FILE: key_file.read_bytes()}
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    digest = hashlib.sha256(b"\0".join(content.values())).hexdigest()[:32]
    copies = folder / digest
    link = folder / _CURRENT
    if link.is_symlink() and link.readlink() == Path(digest):
        return False
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copies.mkdir(mode=0o700, exist_ok=True)
    for name, data in content.items():
        with os.fdopen(
            os.open(copies / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb"
        ) as file:
            file.write(data)
    try:
        check(copies / CERTIFICATE_FILE, copies / KEY_FILE)
    except ValueError:
        shutil.rmtree(copies)
        raise
    # Envoy watches the folder for renamed files: it reads both files when the link changes.
    for name in content:
        _link(folder / name, f"{_CURRENT}/{name}")
    _link(link, digest)
    for other in folder.iterdir():
        if other.is_dir() and not other.is_symlink() and other.name != digest:
            shutil.rmtree(other)
    return True


def _link(path: Path, target: str) -> None:
    """Makes a link, or replaces it by a rename."""
    if path.is_symlink() and path.readlink() == Path(target):
        return
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(path)


def check(certificate_file: Path, key_file: Path) -> None:
    """Checks that a certificate and a key can be used together, and that clients may accept it.

    Raises:
        ValueError: they cannot.
    """

    def refuse_password() -> str:
        raise ValueError("the private key has a password; the edge needs one without")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate_file, key_file, refuse_password
        )
    except ssl.SSLError as error:  # a kind of OSError
        raise ValueError(
            "the certificate and the private key do not belong together, or one is not PEM "
            f"({error.reason or error})"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read {certificate_file} and {key_file}: {error}") from error
    from cryptography import x509  # noqa: PLC0415 - the process that watches needs it rarely

    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise ValueError(f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as error:
        raise ValueError(
            "the certificate has no alternative name (SAN), so that no client accepts it"
        ) from error


def watch(certificate_file: Path, key_file: Path, folder: Path) -> None:
    """Installs the files whenever they change. Never returns."""
    problem = ""
    while True:
        try:
            if install(certificate_file, key_file, folder):
                _log("info", "edge certificate replaced", certificate_file)
            problem = ""
        except ValueError as error:
            # Perhaps only one of the two files has been replaced so far.
            if str(error) != problem:
                problem = str(error)
                _log("warning", f"edge certificate not replaced: {problem}", certificate_file)
        time.sleep(POLL_SECONDS)


def _log(level: str, event: str, certificate_file: Path) -> None:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "event": event,
        "certificate": str(certificate_file),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Watches until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--certificate", "--key", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    watch(arguments.certificate, arguments.key, arguments.folder)


if __name__ == "__main__":
    main()
