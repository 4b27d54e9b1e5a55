"""TLS between the processes of a mesh: both sides show a certificate of the mesh's authority.

It is used for every TCP connection inside a mesh whose processes have certificates, and never on
Unix sockets, where the kernel keeps other accounts out. All certificates have the name `MESH_NAME`,
which clients expect, whatever the machine is called.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MESH_NAME = "mesh.headrace.internal"


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The PEM files of one process.

    Attributes:
        ca: certificates of the authorities whose certificates are accepted.
        certificate: the certificate that it shows, and those between it and the authority.
        key: the private key of the certificate.
    """

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def in_folder(cls, folder: Path, name: str) -> TlsFiles:
        """Returns the files of a process in a folder: `ca.pem`, `NAME.pem` and `NAME.key`."""
        return cls(
            ca=folder / "ca.pem", certificate=folder / f"{name}.pem", key=folder / f"{name}.key"
        )

    def server_context(self, *protocols: str) -> ssl.SSLContext:
        """Returns the settings of a server, which refuses clients without a certificate.

        Args:
            protocols: what it speaks, as in ALPN: `h2`, `http/1.1`.

        Raises:
            OSError: a file cannot be read, or has no valid certificate or key.
        """
        return self._context(ssl.Purpose.CLIENT_AUTH, protocols)

    def client_context(self, *protocols: str) -> ssl.SSLContext:
        """Returns the settings of a client, which expects a server called `MESH_NAME`.

        Raises:
            OSError: as `server_context`.
        """
        return self._context(ssl.Purpose.SERVER_AUTH, protocols)

    def _context(self, purpose: ssl.Purpose, protocols: Sequence[str]) -> ssl.SSLContext:
        # With the file of an authority, those of the machine are not accepted.
        context = ssl.create_default_context(purpose, cafile=str(self.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context
