"""The Open Inference Protocol over several backends, which are real gRPC servers."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from headrace.common.v1.model_pb2 import (
    MODEL_KIND_CHAT,
    MODEL_KIND_EMBEDDING,
    ModelSchema,
)
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget
from tritonclient.grpc import service_pb2

from libs.chat.request import GenerationRequest
from libs.clock import SystemClock
from libs.errors import (
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from libs.routes import Choice, RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Recorder
from services.inference.admission import Admission
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.cache_salts import CacheSalts
from services.inference.tensors.oip import Caller, OpenInference
from tests.support.backends import provider_backend, triton_backend
from tests.support.embedding import eventually
from tests.support.tensor_server import FINAL, TensorServer, serving

CALLER = Caller(Identity("acme", "ann"), None)
STALL = StallLimits(first_token_seconds=0.5, between_tokens_seconds=0.5)
BACKEND_MODEL = "m-1.0.0-abc"
UUID = "0190b5a4-7c3e-7000-8000-0123456789ab"


@dataclass
class Bills:
    """Records usage in memory.

    Attributes:
        is_down: whether recording fails.
    """

    is_down: bool = False
    recorded: list[dict[str, Any]] = field(default_factory=list)

    async def record(self, **event: Any) -> int:
        if self.is_down:
            raise Unavailable("the bus is down", reason="DEPENDENCY_UNAVAILABLE")
        self.recorded.append(event)
        return 1

    async def drain(self) -> None:
        """Nothing is pending."""


@dataclass
class Mesh:
    service: OpenInference
    bills: Bills
    recorder: Recorder
    caller: Caller = CALLER

    async def stream(self, request: Any) -> list[Any]:
        """Returns the messages that answer one request."""
        answers: list[Any] = []

        async def deliver(message: bytes) -> None:
            answers.append(service_pb2.ModelStreamInferResponse.FromString(message))

        await self.service.stream(request.SerializeToString(), self.caller, deliver)
        return answers

    async def infer(self, request: Any) -> Any:
        answer = await self.service.infer(request.SerializeToString(), self.caller)
        return service_pb2.ModelInferResponse.FromString(answer)


async def _count(_choice: Choice, request: GenerationRequest, tenant: str) -> int:
    assert tenant == CALLER.identity.tenant
    return 100 * len(request.messages)


@asynccontextmanager
async def mesh_of(*servers: TensorServer, tmp_path: Any) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(serving(server))
        clock, bills = SystemClock(), Bills()
        backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=STALL)
        stack.push_async_callback(backends.close)
        usage: Any = bills
        recorder = Recorder(usage=usage, hasher=InputHasher(bytes(32)), clock=clock)
        routes = _routes(*servers)
        service = OpenInference(
            routes=lambda: routes,
            backends=backends,
            recorder=recorder,
            admission=Admission(clock),
            count_prompt=_count,
            cache_salts=CacheSalts(InputHasher(bytes(32))),
            clock=clock,
        )
        yield Mesh(service, bills, recorder)


def request(model: str, **fields: Any) -> Any:
    return service_pb2.ModelInferRequest(
        model_name=model, raw_input_contents=[b"\x00\xff"], **{"id": "mine", **fields}
    )


async def test_the_client_sees_public_names_and_the_backend_its_own(tmp_path):
    """Name and version are translated on both ways; the tensors are the same bytes."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        answer = await mesh.infer(request("embedder", model_version="1.0.0", id=UUID))
    (received,) = server.requests
    assert (received.model_name, received.model_version) == (BACKEND_MODEL, "")
    assert list(received.raw_input_contents) == [b"\x00\xff"]
    assert (answer.model_name, answer.model_version, answer.id) == ("embedder", "1.0.0", UUID)
    (bill,) = mesh.bills.recorded
    assert (bill["request_id"], bill["operation"], bill["model"]) == (UUID, "infer", "embedder")
    assert bill["usage"].prompt_tokens == 7


async def test_a_tenant_cannot_choose_the_salt_of_its_prefix_cache(tmp_path):
    """It would read what another one has asked; its own salt is the same in each request."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        await mesh.stream(request("chatter", parameters={"cache_salt": {"string_param": "theirs"}}))
        mesh.caller = Caller(Identity("other", "ann"), None)
        await mesh.stream(request("chatter", parameters={"cache_salt": {"int64_param": 3}}))
        mesh.caller = CALLER
        await mesh.stream(request("chatter"))
        await mesh.infer(request("embedder"))
    mine, other, again, vectors = (each.parameters for each in server.requests)
    salt = mine["cache_salt"].string_param
    assert len(salt) == 32
    assert salt == again["cache_salt"].string_param != other["cache_salt"].string_param != ""
    assert "cache_salt" not in vectors


async def test_tokens_are_billed_whichever_outputs_are_requested(tmp_path):
    """The outputs that report them are added if others are named; none is altered."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        await mesh.infer(request("embedder", outputs=[{"name": "embedding"}]))
    assert [output.name for output in server.requests[0].outputs] == ["embedding", "token_count"]
    for name in ("token_count", "embedding"):
        altered = {"name": name, "parameters": {"classification": {"int64_param": 1}}}
        with pytest.raises(InvalidArgument, match=name):
            await mesh.infer(request("embedder", outputs=[{"name": "embedding"}, altered]))


async def test_the_priority_of_triton_needs_the_highest_one_of_a_token(tmp_path):
    """In it 1 is the highest, so that it cannot be compared with the token's."""
    server = TensorServer()
    first = {"priority": {"int64_param": 1}}
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        mesh.caller = Caller(replace(CALLER.identity, max_priority=8), None)
        for call in (mesh.infer, mesh.stream):
            with pytest.raises(PermissionDenied) as caught:
                await call(request("embedder", parameters=first))
            assert caught.value.reason == "PRIORITY_NOT_ALLOWED"
        assert server.requests == []
        await mesh.infer(request("embedder", parameters={"timeout": {"int64_param": 1000}}))
        mesh.caller = Caller(replace(CALLER.identity, max_priority=9), None)
        await mesh.infer(request("embedder", parameters=first))
    assert server.requests[-1].parameters["priority"].int64_param == 1


async def test_another_backend_answers_if_one_failed(tmp_path):
    """Nothing was delivered, so the client sees no failure."""
    bad = TensorServer(fails=(grpc.StatusCode.UNAVAILABLE, "killed"), dies_after=0)
    good = TensorServer()
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        await mesh.infer(request("embedder"))
        await mesh.stream(request("chatter"))
    assert len(bad.requests) >= 1
    assert len(good.requests) == 2
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [7, 9]


async def test_a_wrong_request_is_tried_once_and_opens_no_breaker(tmp_path):
    """The text is Triton's, with the public name; text of the request itself has no effect."""
    text = f"[request id: mine] unexpected inference input 'Server is ' for model '{BACKEND_MODEL}'"
    server = TensorServer(fails=(grpc.StatusCode.INVALID_ARGUMENT, text), error_message=text)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(12):
            with pytest.raises(InvalidArgument, match=r"for model 'embedder'$"):
                await mesh.infer(request("embedder"))
            with pytest.raises(InvalidArgument, match="unexpected inference input"):
                await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert len(server.requests) == 24
    assert mesh.bills.recorded == []


RAISED = (
    "Failed to process the request(s) for model instance 'm', message: ValueError: canary\n\n"
    "At:\n  /srv/model.py(1): execute\n"
)


async def test_requests_on_which_the_model_fails_open_no_breaker_for_others(tmp_path, capsys):
    """Whoever sends them, and however many: the others are answered."""
    servers = [TensorServer(), TensorServer()]
    async with mesh_of(*servers, tmp_path=tmp_path) as mesh:
        for _ in range(30):
            for server in servers:
                server.fails, server.error_message = (grpc.StatusCode.INTERNAL, RAISED), RAISED
            for call in (mesh.infer(request("embedder")), mesh.stream(request("chatter", id=UUID))):
                with pytest.raises(Internal) as caught:
                    await call
                assert caught.value.reason == "MODEL_FAILED"
                assert caught.value.metadata["request_id"]
                assert "canary" not in str(caught.value)
        for server in servers:
            server.fails, server.error_message = None, ""
        received = sum(len(server.requests) for server in servers)
        await mesh.infer(request("embedder"))
        await mesh.stream(request("chatter"))
    assert received == 30 * 2 * 2  # each is tried twice
    assert sum(len(server.requests) for server in servers) == received + 2
    logged = capsys.readouterr().out
    assert "/srv/model.py(1): execute" in logged
    assert "canary" not in logged


async def test_a_backend_that_fails_on_what_another_answers_is_at_fault(tmp_path):
    """Its breaker opens after a few requests; all of them were answered."""
    broken, good = TensorServer(fails=(grpc.StatusCode.INTERNAL, RAISED)), TensorServer()
    async with mesh_of(broken, good, tmp_path=tmp_path) as mesh:
        for _ in range(20):
            await mesh.infer(request("embedder"))
    assert len(good.requests) == 20
    assert len(broken.requests) == 5


async def test_a_full_queue_opens_no_breaker(tmp_path):
    """One tenant can fill it."""
    server = TensorServer(fails=(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"))
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(10):
            with pytest.raises(ResourceExhausted) as caught:
                await mesh.infer(request("embedder"))
            assert caught.value.reason == "QUEUE_FULL"
        server.fails = None
        await mesh.infer(request("embedder"))


async def test_bytes_that_are_no_text_reach_no_model(tmp_path):
    """A model may fail on them, together with the batch that they are in."""
    server = TensorServer()
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1]}
    message = service_pb2.ModelInferRequest(
        model_name="embedder", inputs=[tensor], raw_input_contents=[b"\x02\0\0\0a\xff"]
    )
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(InvalidArgument, match="UTF-8"):
            await mesh.infer(message)
    assert server.requests == []


@pytest.mark.parametrize("how", [{"dies_after": 2}, {"final": {}}, {"stalls": True}])
async def test_an_interrupted_stream_is_an_error_and_its_tokens_are_billed(how, tmp_path):
    """No other backend starts again: what was delivered cannot be taken back."""
    bad, other = TensorServer(**how), TensorServer(**how)
    async with mesh_of(bad, other, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable) as caught:
            await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert caught.value.reason == "BACKEND_FAILED"
    assert len(bad.requests) + len(other.requests) == 1
    (bill,) = mesh.bills.recorded
    assert bill["usage"].completion_tokens == how.get("dies_after", 3)


async def test_the_last_message_waits_until_the_usage_is_recorded(tmp_path):
    """If that fails the caller gets an error in its place, and nothing is billed twice."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        mesh.bills.is_down = True
        answers: list[bytes] = []

        async def deliver(message: bytes) -> None:
            answers.append(message)

        with pytest.raises(Unavailable, match="bus"):
            await mesh.service.stream(request("chatter").SerializeToString(), CALLER, deliver)
        await mesh.recorder.drain()
    assert len(answers) == 3
    assert mesh.bills.recorded == []


async def test_a_cancelled_call_stops_the_backend(tmp_path):
    """What was generated before is billed."""
    server = TensorServer(stalls=True)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        received, all_received = 0, asyncio.Event()

        async def deliver(_message: bytes) -> None:
            nonlocal received
            received += 1
            if received == 3:
                all_received.set()

        asked = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
        raw = struct.pack("<I", len(asked)) + asked
        message = request("chatter")
        message.raw_input_contents[:] = [raw]
        message = message.SerializeToString()
        reading = asyncio.create_task(mesh.service.stream(message, CALLER, deliver))
        await all_received.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        async with asyncio.timeout(1):
            await server.left.wait()
        await mesh.recorder.drain()
    (bill,) = mesh.bills.recorded
    assert (bill["usage"].prompt_tokens, bill["usage"].completion_tokens) == (100, 3)


@pytest.mark.parametrize("why", ["left", "deadline"])
async def test_who_leaves_a_unary_call_pays_for_it(tmp_path, why):
    """The backend cannot stop in the middle: its slot is taken until it has ended."""
    server = TensorServer()
    server.gate.clear()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        if why == "deadline":
            now = SystemClock().monotonic_seconds()
            mesh.caller = Caller(CALLER.identity, now + 0.2)
        calling = asyncio.create_task(mesh.infer(request("embedder")))
        await eventually(lambda: bool(server.requests))
        if why == "left":
            calling.cancel()
        await asyncio.wait([calling])
        assert mesh.bills.recorded == []
        server.gate.set()
        await mesh.service.drain()
        await mesh.recorder.drain()
    if why == "left":
        assert calling.cancelled()
    else:
        error = calling.exception()
        assert isinstance(error, DeadlineExceeded)
        assert error.metadata == {"waiting_for": "backend"}
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [7]


async def test_fields_that_a_model_adds_to_its_end_are_skipped(tmp_path):
    """A newer model still answers, and is billed."""
    server = TensorServer(final={**FINAL, "draft_tokens": 7, "timings": {"ms": 1.5}})
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        answers = await mesh.stream(request("chatter"))
    assert len(answers) == 4
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [9]


@pytest.mark.parametrize(
    "wrong",
    [
        {"finish_reason": None},
        {"prompt_tokens": "9"},
        {"cached_tokens": -1},
        {"prompt_tokens": 2**31},
    ],
)
async def test_a_malformed_end_is_the_backends_fault(wrong, tmp_path):
    """Neither the caller's, nor an error of this service."""
    server = TensorServer(final=FINAL | wrong)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable) as caught:
            await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert caught.value.reason == "BACKEND_FAILED"
    assert [bill["usage"].completion_tokens for bill in mesh.bills.recorded] == [3]


async def test_the_callers_deadline_is_passed_on_and_charged_to_no_backend(tmp_path):
    """Shorter than any stall: the caller learns what it waited for, the breaker stays closed."""
    server = TensorServer(stalls=True)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(6):  # enough failures would open the breaker
            now = SystemClock().monotonic_seconds()
            mesh.caller = Caller(CALLER.identity, now + 0.2)
            with pytest.raises(DeadlineExceeded) as caught:
                await mesh.stream(request("chatter"))
            assert caught.value.metadata == {"waiting_for": "backend"}
        server.stalls, mesh.caller = False, CALLER
        await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert all(timeout is not None and timeout < 0.2 for timeout in server.timeouts[:6])
    assert server.timeouts[-1] is None


@pytest.mark.parametrize(
    ("model", "version", "kind", "reason"),
    [
        ("nobody", "", NotFound, "MODEL_NOT_FOUND"),
        ("embedder", "1", NotFound, "MODEL_NOT_FOUND"),
        ("chatter", "", InvalidArgument, "MODEL_KIND_MISMATCH"),
        ("provided", "", InvalidArgument, "MODEL_KIND_MISMATCH"),
    ],
)
async def test_models_that_cannot_be_served_are_refused_with_a_reason(
    model: str, version: str, kind: type[HeadraceError], reason: str, tmp_path
):
    """Before any backend is called."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(kind) as caught:
            await mesh.infer(request(model, model_version=version))
    assert caught.value.reason == reason
    assert server.requests == []


def _routes(*servers: TensorServer) -> RouteTable:
    backends = [
        triton_backend(f"b{index}", server.address, model=BACKEND_MODEL)
        for index, server in enumerate(servers)
    ]
    provider = provider_backend("p", "http://127.0.0.1:9")
    models = {
        "embedder": (MODEL_KIND_EMBEDDING, backends),
        "chatter": (MODEL_KIND_CHAT, backends),
        "provided": (MODEL_KIND_EMBEDDING, [provider]),
    }
    return RouteTable(
        epoch="e",
        revision=1,
        routes=[
            ModelRoute(
                model=model,
                targets=[
                    RouteTarget(
                        deployment=f"deployments/{model}",
                        model_version=f"models/{model}/versions/1.0.0",
                        schema=ModelSchema(kind=kind),
                        backends=served,
                    )
                ],
            )
            for model, (kind, served) in models.items()
        ],
    )
