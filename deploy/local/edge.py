"""Connects to the edge of a local mesh with a token signed by the key of the mesh."""

from __future__ import annotations

from deploy import keys
from deploy.client.edge import EdgeClient
from deploy.errors import CliError
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, address, read_ports

TOKEN_SECONDS = 3600


def connect(layout: Layout, *, tenant: str, user: str, scopes: str) -> EdgeClient:
    """Returns a client whose token has these scopes; see `keys.SCOPES`.

    Raises:
        CliError: no mesh was ever started in this folder, or the token cannot be signed.
    """
    found = edge_address(layout)
    try:
        token = keys.mint_token(
            layout.home, tenant=tenant, user=user, scopes=scopes, ttl_seconds=TOKEN_SECONDS
        )
    except ValueError as error:
        raise CliError(str(error)) from error
    return EdgeClient(found, token=token)


def edge_address(layout: Layout) -> str:
    """Returns the edge's `host:port`.

    Raises:
        CliError: no mesh was ever started in this folder.
    """
    ports = read_ports(layout)
    if EDGE not in ports:
        raise CliError(f"no mesh was started in {layout.home}; `headrace up` starts one")
    return address(ports, EDGE)
