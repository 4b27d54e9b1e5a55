"""Connects to the edge of a local mesh with a token signed by the key of the mesh."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy import keys
from deploy.client.edge import EdgeClient
from deploy.errors import CliError
from deploy.local import edge_certificate
from deploy.local.layout import Layout
from deploy.local.ports import EDGE

TOKEN_SECONDS = 3600


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


def connect(layout: Layout, *, tenant: str, user: str, scopes: str) -> EdgeClient:
    """Returns a client whose token has these scopes; see `keys.SCOPES`.

    Raises:
        CliError: no mesh was ever started in this folder, or the token cannot be signed.
    """
    found = local_edge(layout)
    try:
        token = keys.mint_token(
            layout.home, tenant=tenant, user=user, scopes=scopes, ttl_seconds=TOKEN_SECONDS
        )
        certificate = found.certificate_file and Path(found.certificate_file).read_text()
    except (ValueError, OSError) as error:
        raise CliError(str(error)) from error
    return EdgeClient(found.address, token=token, certificate=certificate)


def local_edge(layout: Layout) -> LocalEdge:
    """Returns how to call the edge of the mesh in this folder.

    Raises:
        CliError: no mesh was ever started in it.
    """
    try:
        return LocalEdge(**json.loads(layout.edge_file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CliError(f"no mesh was started in {layout.home}; `headrace up` starts one") from error


def write_edge(layout: Layout, ports: Mapping[str, int]) -> None:
    """Records how to call the edge: a command may run without the variables that started it."""
    certificate, _ = edge_certificate.installed(layout.edge_tls)
    edge = LocalEdge(
        address=layout.edge.call_address(ports[EDGE]),
        certificate_file=str(certificate) if layout.edge.certificate_file else "",
    )
    layout.edge_file.write_text(json.dumps(asdict(edge)))
