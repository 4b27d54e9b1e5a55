"""Connects to the edge of a local mesh with a token signed by the key of the mesh."""

from __future__ import annotations

import time

import grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from deploy import keys
from deploy.client.edge import EdgeClient
from deploy.envoy import render
from deploy.errors import CliError
from deploy.local.configuration import edge_settings
from deploy.local.edge_record import LocalEdge, local_edge
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, read_ports

TOKEN_SECONDS = 3600
ACCEPT_SECONDS = 10.0
# All threads of the edge get a new key within milliseconds of the first.
SETTLE_SECONDS = 0.2
# The token is good but has no scope; or the service behind the edge, or the edge itself, is down.
_ACCEPTED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
_POLL_SECONDS = 0.02
_CALL_SECONDS = 2.0


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
    except ValueError as error:
        raise CliError(str(error)) from error
    return _client(found, token)


def introduce(layout: Layout, token: str) -> None:
    """Lets the edge read its keys again, and returns when it accepts a token of a new one.

    Returns immediately where no edge runs.

    Args:
        layout: the mesh.
        token: one without scopes: the call that tries it needs one, so that it does nothing.

    Raises:
        CliError: the edge does not accept it.
    """
    ports = read_ports(layout)
    if EDGE not in ports:
        return
    render.write_tokens(edge_settings(layout, ports))
    deadline = time.monotonic() + ACCEPT_SECONDS
    with _client(local_edge(layout), token) as edge:
        stub = registry_pb2_grpc.RegistryServiceStub(edge.channel)
        while time.monotonic() < deadline:
            try:
                stub.ListModels(
                    registry_pb2.ListModelsRequest(), metadata=edge.metadata, timeout=_CALL_SECONDS
                )
            except grpc.RpcError as error:
                if error.code() in _ACCEPTED:
                    time.sleep(SETTLE_SECONDS)
                    return
            time.sleep(_POLL_SECONDS)
    raise CliError(
        f"the edge does not accept the new key after {ACCEPT_SECONDS:g} s; see `headrace logs "
        "envoy`, and rotate again"
    )


def _client(edge: LocalEdge, token: str) -> EdgeClient:
    try:
        return EdgeClient(edge.address, token=token, certificate=edge.certificate())
    except ValueError as error:
        raise CliError(str(error)) from error
