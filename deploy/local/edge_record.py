"""How programs on this machine call the edge of a mesh, as the start of the mesh recorded it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.local import edge_certificate
from deploy.local.layout import Layout
from deploy.local.ports import EDGE


@dataclass(frozen=True, kw_only=True)
class LocalEdge:
    """How programs on this machine call the edge.

    Attributes:
        address: `host:port`.
        certificate_file: the edge's certificate, which its own clients trust; empty: no TLS.
    """

    address: str
    certificate_file: str = ""

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"{'https' if self.certificate_file else 'http'}://{self.address}"

    def certificate(self) -> str:
        """Returns the certificate, PEM; empty without TLS.

        Raises:
            CliError: it cannot be read.
        """
        try:
            return Path(self.certificate_file).read_text() if self.certificate_file else ""
        except OSError as error:
            raise CliError(f"cannot read the edge's certificate: {error}") from error


def local_edge(layout: Layout) -> LocalEdge:
    """Returns how to call the edge of the mesh in this folder.

    Raises:
        CliError: no mesh was ever started in it.
        PermissionError: it is the folder of another user.
    """
    try:
        return LocalEdge(**json.loads(layout.edge_file.read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError) as error:
        raise CliError(f"no mesh was started in {layout.home}; `headrace up` starts one") from error


def write_edge(layout: Layout, ports: Mapping[str, int]) -> None:
    """Records how to call the edge: a command may run without the variables that started it."""
    certificate, _ = edge_certificate.installed(layout.edge_tls)
    edge = LocalEdge(
        address=layout.edge.call_address(ports[EDGE]),
        certificate_file=str(certificate) if layout.edge.certificate_file else "",
    )
    layout.edge_file.write_text(json.dumps(asdict(edge)))
