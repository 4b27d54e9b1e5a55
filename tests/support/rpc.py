"""Test handlers behind the server of `libs.rpc`, called through its channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from libs.rpc.access import INFER, OPEN
from libs.rpc.channel import open_channel
from libs.rpc.identity import Identity
from tests.support.edge import serving

SERVICE = "headrace.test.v1.TestService"
CALLER = Identity("acme", "ann", frozenset({INFER}))


class Calls:
    """A client; each method is named after its kind of call."""

    def __init__(self, channel: grpc.aio.Channel | CallerChannel) -> None:
        self._channel = channel
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        self.unary_unary, self.unary_stream, self.stream_unary, self.stream_stream = (
            getattr(channel, kind)(
                f"/{SERVICE}/{kind}",
                request_serializer=StringValue.SerializeToString,
                response_deserializer=StringValue.FromString,
            )
            for kind in kinds
        )


@asynccontextmanager
async def handled_by(
    traced: bool = False, caller: Identity | None = None, /, **handlers: Callable[[Any, Any], Any]
) -> AsyncIterator[Calls]:
    """Serves handlers, each named after its kind of call.

    Args:
        traced: calls have spans.
        caller: who calls; None: no identity, and the methods are open, so that messages are small.
        **handlers: the methods.
    """

    def register(server: grpc.aio.Server) -> None:
        methods = {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(
                handler,
                request_deserializer=StringValue.FromString,
                response_serializer=StringValue.SerializeToString,
            )
            for kind, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, methods)
        server.add_generic_rpc_handlers((generic,))

    async with (
        serving(register, scope_of=lambda _: INFER if caller else OPEN) as address,
        open_channel(address, traced=traced, retries=False) as channel,
    ):
        yield Calls(CallerChannel(channel, caller) if caller else channel)


def value(text: str) -> StringValue:
    return StringValue(value=text)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Returns the reason in the details; their code and message must be those of the call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an error is a call
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "headrace"
    return str(info.reason)


class CallerChannel:
    """A channel whose calls have a caller's metadata, unless they are given other metadata."""

    def __init__(self, channel: grpc.aio.Channel, caller: Identity) -> None:
        self._channel = channel
        self._metadata = caller.metadata()

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """Returns what stubs call: `unary_unary` and the other kinds."""
        make = getattr(self._channel, kind)

        def method(*arguments: Any, **options: Any) -> Callable[..., Any]:
            call = make(*arguments, **options)

            def start(request: Any, *, metadata: Any = None, **more: Any) -> Any:
                return call(request, metadata=metadata or self._metadata, **more)

            return start

        return method
