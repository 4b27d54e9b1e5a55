"""A channel to the edge with a token, and what the errors of its calls say."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_DETAILS_KEY = "grpc-status-details-bin"


class EdgeClient:
    """A channel to the edge of a mesh and the metadata of its calls. Use it in a `with`.

    Attributes:
        address: the edge's `host:port`.
        channel: a synchronous channel to it.
        metadata: the token; pass it to every call.
    """

    def __init__(self, address: str, *, token: str) -> None:
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
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


def retry_seconds(error: grpc.RpcError) -> float | None:
    """Returns how long to wait before the next try; None if the server asks for none."""
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in _details(error)):
        return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None


def describe(error: grpc.RpcError) -> str:
    """Returns the code, message, violations and reason of a failed RPC in one line."""
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    text = error.details() or ""
    details = _details(error)
    for detail in details:
        if detail.Unpack(request):
            for violation in request.field_violations:
                if violation.description not in text:
                    text = f"{text}; {violation.field}: {violation.description}"
    reason = "".join(f" ({info.reason})" for detail in details if detail.Unpack(info))
    return f"{error.code().name}: {text}{reason}"


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    for entry in error.trailing_metadata() or ():
        if entry.key == _DETAILS_KEY and isinstance(entry.value, bytes):
            return tuple(status_pb2.Status.FromString(entry.value).details)
    return ()
