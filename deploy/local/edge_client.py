"""Calls a mesh as its users do: through the edge, with a token."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from deploy import keys
from deploy.errors import CliError
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, address, read_ports

TENANT = "acme"
USER = "ann"
TOKEN_SECONDS = 3600
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_DETAILS_KEY = "grpc-status-details-bin"


class EdgeClient:
    """A channel to the edge of a mesh and the metadata that its calls need. Use it in a `with`.

    Attributes:
        address: the edge's `host:port`.
        metadata: the token.
    """

    def __init__(
        self, layout: Layout, *, tenant: str = TENANT, user: str = USER, scopes: str = "infer"
    ) -> None:
        self.address = edge_address(layout)
        token = keys.mint_token(
            layout.home, tenant=tenant, user=user, scopes=scopes, ttl_seconds=TOKEN_SECONDS
        )
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.channel.close()


def edge_address(layout: Layout) -> str:
    """Returns where the edge listens.

    Raises:
        CannotRun: there was never a mesh.
    """
    ports = read_ports(layout)
    if EDGE not in ports:
        raise CliError(f"no mesh was started in {layout.home}; `headrace up` starts one")
    return address(ports, EDGE)


def retry_seconds(error: grpc.RpcError) -> float | None:
    """Returns when the server wants to be asked again; None: it does not say."""
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in _details(error)):
        return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None


def describe(error: grpc.RpcError) -> str:
    """Returns an RPC's failure in one line: code, message, reason."""
    info = error_details_pb2.ErrorInfo()
    reason = "".join(f" ({info.reason})" for detail in _details(error) if detail.Unpack(info))
    return f"{error.code().name}: {error.details()}{reason}"


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    for entry in error.trailing_metadata() or ():
        if entry.key == _DETAILS_KEY and isinstance(entry.value, bytes):
            return tuple(status_pb2.Status.FromString(entry.value).details)
    return ()
