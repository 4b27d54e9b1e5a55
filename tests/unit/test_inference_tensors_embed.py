"""Embeddings: large requests in parts, fair to others, and billed also to who leaves."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from headrace.common.v1.model_pb2 import MODEL_KIND_EMBEDDING, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget
from tritonclient.grpc import service_pb2
from typing_extensions import override

from libs.clock import SystemClock
from libs.embedding_texts import MAX_BYTES_PER_TOKEN
from libs.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from libs.routes import RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Recorder
from services.inference.admission import Admission
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.slots import DEFAULT_MEMORY_LIMIT_BYTES
from services.inference.tensors.embed import Embedder
from tests.support.backends import triton_backend
from tests.support.embedding import eventually
from tests.support.tensor_server import TensorServer, serving

ACME, EVIL = Identity("acme", "ann"), Identity("evil", "eve")
MAX_INPUT_TOKENS = 256
LONG = "stone " * 400
STALL = StallLimits(first_token_seconds=5.0, between_tokens_seconds=5.0)


@dataclass
class Model(TensorServer):
    """An embedding model: each text has as many tokens as words, and its order as its vector.

    Attributes:
        texts: of each call.
    """

    texts: list[list[str]] = field(default_factory=list)

    @override
    def __post_init__(self) -> None:
        """Calls wait until a test opens the gate."""

    @override
    async def infer(self, request: Any, context: Any) -> Any:
        raw, texts = request.raw_input_contents[0], []
        while raw:
            (size,) = struct.unpack_from("<I", raw)
            texts.append(raw[4 : 4 + size].decode())
            raw = raw[4 + size :]
        self.texts.append(texts)
        await self.gate.wait()
        rows = [len(text.split()) for text in texts]
        outputs = {
            "embedding": struct.pack(f"<{len(rows)}f", *map(float, rows)),
            "token_count": struct.pack(f"<{len(rows)}i", *rows),
        }
        return service_pb2.ModelInferResponse(
            outputs=[
                service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs
            ],
            raw_output_contents=list(outputs.values()),
        )


class Bills:
    """Keeps what is billed, by tenant."""

    def __init__(self) -> None:
        self.tokens: list[tuple[str, int]] = []

    async def record(self, *, identity: Identity, usage: Any, **_: Any) -> int:
        self.tokens.append((identity.tenant, usage.prompt_tokens))
        return 0

    async def drain(self) -> None:
        pass


@dataclass
class Service:
    embedder: Embedder
    admission: Admission
    recorder: Recorder
    bills: Bills
    model: Model

    async def settled(self) -> None:
        """Returns when nothing runs any more."""
        await self.embedder.drain()
        await self.recorder.drain()


@asynccontextmanager
async def service_of(
    tmp_path: Any, memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES
) -> AsyncIterator[Service]:
    model, clock, bills = Model(), SystemClock(), Bills()
    async with serving(model):
        target = RouteTarget(
            deployment="deployments/e",
            model_version="models/e/versions/1.0.0",
            schema=ModelSchema(kind=MODEL_KIND_EMBEDDING, max_input_tokens=MAX_INPUT_TOKENS),
            backends=[triton_backend("triton-0", model.address)],
        )
        table = RouteTable(epoch="e", revision=1, routes=[ModelRoute(model="e", targets=[target])])
        backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=STALL)
        admission = Admission(clock, memory_limit_bytes=memory_limit_bytes)
        usage: Any = bills
        recorder = Recorder(usage=usage, hasher=InputHasher(bytes(32)), clock=clock)
        embedder = Embedder(
            routes=lambda: table,
            backends=backends,
            admission=admission,
            recorder=recorder,
            clock=clock,
        )
        yield Service(embedder, admission, recorder, bills, model)
        model.gate.set()
        await embedder.drain()
        await backends.close()


def counts(embeddings: Any) -> list[int]:
    return [count for _, count in embeddings.vectors]


async def test_the_vectors_are_in_the_order_of_the_texts(tmp_path):
    """However they are divided, also where the parts end in another order."""
    texts = [" ".join(["word"] * (1 + number % 17)) for number in range(500)]
    async with service_of(tmp_path) as service:
        service.model.gate.set()
        embeddings = await service.embedder.embed("e", texts, ACME)
        assert counts(embeddings) == [1 + number % 17 for number in range(500)]
        assert [struct.unpack("<f", vector)[0] for vector, _ in embeddings.vectors] == counts(
            embeddings
        )
        assert len(service.model.texts) > 500 // 64
        assert service.bills.tokens == []  # the embedding cache bills


async def test_a_large_request_leaves_room_for_others(tmp_path):
    """Its parts are small, few of them are at the backend, and another tenant is next."""
    async with service_of(tmp_path) as service:
        flood = asyncio.create_task(service.embedder.embed("e", [LONG] * 200, EVIL))
        await eventually(lambda: bool(service.model.texts))
        await asyncio.sleep(0.1)
        at_backend = sum(map(len, service.model.texts))
        assert at_backend == 1
        victim = asyncio.create_task(service.embedder.embed("e", ["hello you"], ACME))
        await asyncio.sleep(0.1)
        service.model.gate.set()
        assert counts(await victim) == [2]
        sent = [text for texts in service.model.texts for text in texts]
        assert sent.index("hello you") <= at_backend + 2
        assert len((await flood).vectors) == 200


async def test_a_caller_who_leaves_stops_what_waits_and_pays_for_what_ran(tmp_path):
    """A part at the backend is left to end, with its slot."""
    async with service_of(tmp_path) as service:
        leaving = asyncio.create_task(service.embedder.embed("e", [LONG] * 200, EVIL))
        await eventually(lambda: bool(service.model.texts))
        await asyncio.sleep(0.1)
        at_backend = sum(map(len, service.model.texts))
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert service.bills.tokens == []
        service.model.gate.set()
        await service.settled()
        assert sum(map(len, service.model.texts)) == at_backend
        assert service.bills.tokens == [("evil", at_backend * len(LONG.split()))]
        queue = service.admission.queue(
            RouteTarget(deployment="deployments/e", schema=ModelSchema(kind=MODEL_KIND_EMBEDDING))
        )
        assert (queue._slots.used, queue._places.used, queue._memory.used) == (0, 0, 0)
        assert not queue._queue


async def test_a_deadline_does_not_make_the_parts_before_it_free(tmp_path):
    """What was computed until then is billed, as if the caller had left."""
    async with service_of(tmp_path) as service:
        service.model.gate.set()
        deadline = SystemClock().monotonic_seconds() + 0.4
        late = asyncio.create_task(
            service.embedder.embed("e", [LONG] * 1000, EVIL, deadline_seconds=deadline)
        )
        await eventually(lambda: len(service.model.texts) >= 3)
        service.model.gate.clear()
        with pytest.raises((DeadlineExceeded, ResourceExhausted)):
            await late
        service.model.gate.set()
        await service.settled()
        ((tenant, tokens),) = service.bills.tokens
        assert tenant == "evil"
        assert len(LONG.split()) <= tokens < 1000 * len(LONG.split())


async def test_a_request_that_was_refused_is_not_billed(tmp_path):
    """No backend has received any of it."""
    async with service_of(tmp_path, memory_limit_bytes=10) as service:
        with pytest.raises(ResourceExhausted):
            await service.embedder.embed("e", ["a b"], EVIL)
        await service.settled()
        assert service.bills.tokens == []


async def test_a_job_that_is_cancelled_is_not_billed_here(tmp_path):
    """It is tried again, and booked once."""
    job = Identity("acme", "ann", usage_id="0190")
    async with service_of(tmp_path) as service:
        leaving = asyncio.create_task(service.embedder.embed("e", ["a b"], job))
        await eventually(lambda: bool(service.model.texts))
        leaving.cancel()
        await asyncio.wait([leaving])
        service.model.gate.set()
        await service.settled()
        assert service.bills.tokens == []


async def test_a_text_that_is_too_long_is_refused_by_its_size(tmp_path):
    """Nothing is sent to a backend."""
    async with service_of(tmp_path) as service:
        text = "a" * (MAX_INPUT_TOKENS * MAX_BYTES_PER_TOKEN + 1)
        with pytest.raises(InvalidArgument) as caught:
            await service.embedder.embed("e", ["fine", text], ACME)
        assert caught.value.field_violations[0][0] == "texts[1]"
        assert service.model.texts == []


async def test_too_much_memory_is_refused_to_one_tenant_only(tmp_path):
    """The texts of a request count as long as it runs."""
    async with service_of(tmp_path, memory_limit_bytes=2_000_000) as service:
        floods = [
            asyncio.create_task(service.embedder.embed("e", [LONG] * 100, EVIL)) for _ in range(10)
        ]
        await eventually(lambda: any(flood.done() for flood in floods))
        await asyncio.sleep(0.1)
        victim = asyncio.create_task(service.embedder.embed("e", [LONG] * 100, ACME))
        await asyncio.sleep(0.1)
        service.model.gate.set()
        assert len((await victim).vectors) == 100
        ends = await asyncio.gather(*floods, return_exceptions=True)
        refused = [end for end in ends if isinstance(end, HeadraceError)]
        assert refused
        assert all(isinstance(error, ResourceExhausted) for error in refused)
        assert {error.metadata["queue"] for error in refused} == {"inference.memory"}
