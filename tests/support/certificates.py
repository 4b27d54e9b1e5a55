"""A certificate authority for tests."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates; only clients with its TLS settings trust it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = _name("an authority of the tests")
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = self._signed(self._name, self._key, constraints)

    def pem(self) -> str:
        """Returns the authority's certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def trusted(self) -> ssl.SSLContext:
        """Returns the TLS settings of a client that trusts only this authority."""
        return ssl.create_default_context(cadata=self.pem())

    def server(self, *, names: tuple[str, ...] = (), address: str = "") -> ssl.SSLContext:
        """Returns the TLS settings of a server with these names, or this address."""
        certificate, key = self.issue(names=names, address=address)
        file = self._folder / "server.pem"
        file.write_bytes(key + certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def issue(
        self, *, names: tuple[str, ...] = (), address: str = "", valid_hours: float = 1
    ) -> tuple[bytes, bytes]:
        """Returns the certificate and the private key of a server, both PEM.

        With negative hours it has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        named: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        if address:
            named.append(x509.IPAddress(ip_address(address)))
        alternatives = x509.SubjectAlternativeName(named)
        certificate = self._signed(
            _name("a server of the tests"), key, alternatives, valid_hours=valid_hours
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return certificate.public_bytes(serialization.Encoding.PEM), private

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType,
        *,
        valid_hours: float = 1,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=valid_hours))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
