"""Ten thousand random and changed messages for the public RPCs, through the edge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2

from libs.rpc.public_api import public_services
from tests.fuzz.mutate import Mutator
from tests.support.fuzzing import ALL_SCOPES, Slowest, heartbeat, in_parallel, unharmed
from tests.support.mesh import RunningMesh
from tests.support.random_messages import random_message

pytestmark = [pytest.mark.integration, pytest.mark.storm]

MESSAGES = 10_000
SEED = "protobuf"
WIDTH = 16
CALL_SECONDS = 5.0
# Streams that would go on.
STREAM_SECONDS = 0.3
_FAULTS = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
# GRPC itself reports these to a client that gave up.
_UNSENT = "Internal error from Core"
_OWN = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class Method(NamedTuple):
    """An RPC, and how it is called."""

    path: str
    kind: str
    request: Descriptor


class Call(NamedTuple):
    """A call that the test makes."""

    method: Method
    messages: tuple[bytes, ...]


def methods() -> list[Method]:
    """Returns the public RPCs, those of the Open Inference Protocol, health and reflection."""
    services = [
        *public_services(),
        service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    return [
        Method(
            f"/{service.full_name}/{method.name}",
            f"{_kind(method.client_streaming)}_{_kind(method.server_streaming)}",
            method.input_type,
        )
        for service in services
        for method in service.methods
    ]


def _kind(streams: bool) -> str:
    return "stream" if streams else "unary"


def calls() -> Iterator[Call]:
    """Yields the calls of the test; the same ones each time."""
    mutator = Mutator(SEED)
    source = mutator.random
    every = methods()
    for number in range(MESSAGES):
        method = every[number % len(every)]
        count = source.choice((0, 1, 2, 3)) if method.kind.startswith("stream") else 1
        messages = []
        for _ in range(count):
            message = random_message(source, method.request).SerializeToString()
            messages.append(mutator.mutated([message]) if source.random() < 0.6 else message)
        yield Call(method, tuple(messages))


class Caller:
    """Calls through the edge with bytes."""

    def __init__(self, mesh: RunningMesh, channel: Any) -> None:
        self._channel = channel
        self._metadata = mesh.metadata(scopes=ALL_SCOPES)
        self.slowest = Slowest[Call]()
        self.statuses: dict[str, int] = {}

    async def send(self, call: Call) -> None:
        """Makes a call, and checks how it ends."""
        method = getattr(self._channel, call.method.kind)(call.method.path)
        streams_requests, streams_responses = (
            part == "stream" for part in call.method.kind.split("_")
        )
        request = iter(call.messages) if streams_requests else call.messages[0]
        timeout = STREAM_SECONDS if streams_responses else CALL_SECONDS
        began = time.perf_counter()
        made = method(request, metadata=self._metadata, timeout=timeout)
        try:
            if streams_responses:
                async for _ in made:
                    pass
            else:
                await made
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
            self._check(call, error)
        if not streams_responses:
            self.slowest.add(time.perf_counter() - began, call)
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def _check(self, call: Call, error: grpc.aio.AioRpcError) -> None:
        details = error.details() or ""
        if "RST_STREAM" in details and call.method.kind.endswith("stream"):
            return  # the edge ended it at its deadline, a moment before the service did
        if details == _UNSENT and call.method.kind.startswith("stream"):
            return  # the call ended while the client sent; the logs would have a fault
        assert error.code() not in _FAULTS, (call, error)
        if error.code() in _OWN:
            return
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an error is a call
        assert status is not None, (call, error)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info), (call, error)
        assert info.domain == "headrace"

    async def beat(self) -> None:
        """Makes a call that succeeds."""
        path = "/headrace.registry.v1.RegistryService/ListModels"
        await self._channel.unary_unary(path)(b"", metadata=self._metadata, timeout=CALL_SECONDS)


async def test_no_message_is_answered_with_a_fault(bare_mesh):
    """No `UNKNOWN` or `INTERNAL`, a reason with each error, no stall, no restart."""
    with unharmed(bare_mesh):
        async with bare_mesh.channel() as channel:
            caller = Caller(bare_mesh, channel)
            async with heartbeat(caller.beat):
                await in_parallel(calls(), caller.send, width=WIDTH)
            await caller.slowest.check(caller.send)
    print(caller.statuses)
    assert caller.statuses["OK"] > MESSAGES / 100
    assert caller.statuses["INVALID_ARGUMENT"] > MESSAGES / 10
