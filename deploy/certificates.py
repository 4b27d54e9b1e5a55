"""The authority of one mesh, and the certificates of its processes.

`HEADRACE_HOME/keys/mesh` holds `ca.pem` and `ca.key`, the authority, made at the first start; and
`NAME.pem` and `NAME.key` for each process. Certificates are made again at a start in their last
days. To replace all of them, stop the mesh and delete the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.keys import KeyFileError, keys_dir
from deploy.keys.files import replace
from libs.clock import Clock, SystemClock
from libs.tls import MESH_NAME, TlsFiles

AUTHORITY_VALID = timedelta(days=3650)
VALID = timedelta(days=730)
# A mesh runs for at most so long before it must be started again.
RENEW_BEFORE = timedelta(days=180)
_CLOCKS_DIFFER = timedelta(hours=1)

_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
# What runs code of others, or is called only, has a certificate that no server accepts of a client.
NAMES: Mapping[str, tuple[x509.ObjectIdentifier, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "registry", "router", "inference", "embedding_cache", "cost", "jobs", "worker",
                "pool_agent",
            ),
            (_CLIENT, _SERVER),
        ),
        "envoy": (_CLIENT,),
        "operator": (_CLIENT,),
        "nats": (_SERVER,),
        "triton": (_SERVER,),
    }
)  # fmt: skip


def tls_folder(home: Path) -> Path:
    """Returns the folder of the certificates."""
    return keys_dir(home) / "mesh"


def tls_files(home: Path, name: str) -> TlsFiles:
    """Returns the files of a process, one of `NAMES`."""
    return TlsFiles.in_folder(tls_folder(home), name)


def ensure_certificates(home: Path, *, clock: Clock | None = None) -> None:
    """Creates the authority and the certificates that do not exist yet or end soon.

    Call it from one process at a time.

    Raises:
        KeyFileError: a file cannot be written, or has no valid certificate or key.
    """
    now = (clock or SystemClock()).now()
    folder = tls_folder(home)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        authority, key = _authority(folder, now)
        for name, usages in NAMES.items():
            if not _is_good(folder / f"{name}.pem", folder / f"{name}.key", authority, now):
                _issue(folder, name, usages, authority=authority, authority_key=key, now=now)
    except OSError as error:
        raise KeyFileError(
            f"{error.filename}: cannot create the certificates: {error.strerror}"
        ) from error
    except ValueError as error:
        raise KeyFileError(
            f"{folder}: invalid certificate or key ({error}); stop the mesh and delete the folder"
        ) from error


def _authority(folder: Path, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
    if certificate_file.exists() and key_file.exists():
        key = _load_key(key_file)
        # While authorities are exchanged there are two. None has the key after a crash between the
        # two writes below.
        for certificate in x509.load_pem_x509_certificates(certificate_file.read_bytes()):
            is_pair = certificate.public_key() == key.public_key()
            if is_pair and certificate.not_valid_after_utc - now > RENEW_BEFORE:
                return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("mesh authority")
    certificate = (
        _builder(subject, subject, key, now, AUTHORITY_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    replace(key_file, _pem(key))
    replace(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _issue(
    folder: Path,
    name: str,
    usages: tuple[x509.ObjectIdentifier, ...],
    *,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    valid = min(VALID, authority.not_valid_after_utc - now)
    names = [x509.DNSName(MESH_NAME), x509.DNSName(f"{name.replace('_', '-')}.{MESH_NAME}")]
    certificate = (
        _builder(_subject(name), authority.subject, key, now, valid)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    replace(folder / f"{name}.key", _pem(key))
    replace(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _is_good(
    certificate_file: Path, key_file: Path, authority: x509.Certificate, now: datetime
) -> bool:
    if not (certificate_file.exists() and key_file.exists()):
        return False
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError):
        return False
    left = certificate.not_valid_after_utc - now
    if left <= min(RENEW_BEFORE, (authority.not_valid_after_utc - now) / 2):
        return False
    return certificate.public_key() == _load_key(key_file).public_key()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    valid: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Headrace"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path}: other users can read it; run chmod 600, or delete it")
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} has no P-256 key")  # noqa: TRY004 - what the file has
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
