"""What a client that leaves a stream of tensors holds after that: nothing."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from libs.clock import SystemClock
from libs.errors import Internal
from libs.rpc.identity import TENANT_KEY, USER_KEY
from libs.shared_limit import SharedLimit
from services.inference.api.arrivals import COPIES, Arrivals
from services.inference.api.oip import (
    MAX_REQUESTS_PER_STREAM,
    OpenInferenceServicer,
    stream_handlers,
)
from services.inference.backends.triton.client import SERVICE
from services.inference.slots import REQUEST_OVERHEAD_BYTES

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # not in the stubs


class Call:
    """A client's stream, as gRPC shows it to a handler."""

    def __init__(self, *messages: bytes) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.answers: list[bytes] = []
        for message in messages:
            self.messages.put_nowait(message)

    def invocation_metadata(self) -> Any:
        return ((TENANT_KEY, "acme"), (USER_KEY, "ann"))

    def time_remaining(self) -> None:
        return None

    async def read(self) -> Any:
        return await self.messages.get()

    async def write(self, message: bytes) -> None:
        self.answers.append(message)


async def never_answered(_request: bytes, _caller: Any, _deliver: Any) -> None:
    await asyncio.Event().wait()


def servicer(memory: SharedLimit, stream: Any = never_answered) -> OpenInferenceServicer:
    service: Any = SimpleNamespace(stream=stream)
    return OpenInferenceServicer(service, Arrivals(memory, SystemClock()), clock=SystemClock())


def start(memory: SharedLimit, call: Any, stream: Any = never_answered) -> asyncio.Task[None]:
    made = servicer(memory, stream).model_stream_infer(call, call)
    return asyncio.create_task(made)


async def reaches(memory: SharedLimit, size_bytes: int) -> bool:
    """Waits until so much memory is used; False: it is not for seconds."""
    for _ in range(300):
        if memory.used == size_bytes:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("steps", [*range(8), 500])
async def test_a_client_that_leaves_holds_no_memory(steps):
    """At any step: while its requests start, and while one more than may run waits to be read."""
    memory = SharedLimit(2**30, alpha=1.0)
    call = Call(*[b"request"] * (MAX_REQUESTS_PER_STREAM + 1))
    task = start(memory, call)
    for _ in range(steps):
        await asyncio.sleep(0)
    if steps == 500:
        assert call.messages.qsize() == 1
        assert memory.used
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert memory.used == 0


async def test_a_client_of_grpc_that_leaves_holds_no_memory(tmp_path):
    """As above, with what gRPC does when a connection ends."""
    memory = SharedLimit(2**30, alpha=1.0)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((stream_handlers(servicer(memory)),))
    address = f"unix:{tmp_path}/s"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        open_stream: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)
        call = open_stream(metadata=((TENANT_KEY, "acme"), (USER_KEY, "ann")))
        for _ in range(MAX_REQUESTS_PER_STREAM + 1):
            await call.write(b"request")
        held = MAX_REQUESTS_PER_STREAM * (REQUEST_OVERHEAD_BYTES + COPIES * len(b"request"))
        assert await reaches(memory, held)
        await asyncio.sleep(0.05)
        assert memory.used == held
        call.cancel()
        assert await reaches(memory, 0)
    await server.stop(None)


async def test_the_next_request_is_read_when_one_has_ended():
    """And the stream ends after the last answer."""
    memory = SharedLimit(2**30, alpha=1.0)
    going_on = asyncio.Event()

    async def answered(_request: bytes, _caller: Any, deliver: Any) -> None:
        await going_on.wait()
        await deliver(b"answer")

    call = Call(*[b"request"] * (2 * MAX_REQUESTS_PER_STREAM), EOF)
    task = start(memory, call, answered)
    await asyncio.sleep(0.01)
    assert call.messages.qsize() == MAX_REQUESTS_PER_STREAM + 1
    going_on.set()
    await asyncio.wait_for(task, 5)
    assert len(call.answers) == 2 * MAX_REQUESTS_PER_STREAM
    assert memory.used == 0


async def test_a_request_that_fails_releases_the_others():
    """Those that run, and those that have not begun."""
    memory = SharedLimit(2**30, alpha=1.0)

    async def fails(request: bytes, _caller: Any, _deliver: Any) -> None:
        if request == b"bad":
            raise ValueError("a fault")
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="a fault"):
        await asyncio.wait_for(start(memory, Call(b"good", b"bad", b"good", b"good"), fails), 5)
    assert memory.used == 0


async def test_a_request_that_never_fits_is_refused_and_the_stream_goes_on():
    """Its answer has its id."""
    memory = SharedLimit(REQUEST_OVERHEAD_BYTES + COPIES * 100, alpha=1.0)

    async def answered(_request: bytes, _caller: Any, deliver: Any) -> None:
        await deliver(b"answer")

    large = service_pb2.ModelInferRequest(id="1", raw_input_contents=[bytes(200)])
    call = Call(large.SerializeToString(), b"small", EOF)
    await asyncio.wait_for(start(memory, call, answered), 2)
    refused, answer = call.answers
    read = service_pb2.ModelStreamInferResponse.FromString(refused)
    assert json.loads(read.error_message)["reason"] == "QUEUE_FULL"
    assert read.infer_response.id == "1"
    assert answer == b"answer"
    assert memory.used == 0


async def test_an_error_of_a_request_is_answered_with_its_id():
    """The stream continues."""
    memory = SharedLimit(2**30, alpha=1.0)

    async def fails(_request: bytes, _caller: Any, _deliver: Any) -> None:
        raise Internal("a fault", reason="INTERNAL")

    message = service_pb2.ModelInferRequest(id="2").SerializeToString()
    call = Call(message, EOF)
    await asyncio.wait_for(start(memory, call, fails), 2)
    (answer,) = call.answers
    assert service_pb2.ModelStreamInferResponse.FromString(answer).infer_response.id == "2"
