"""The Open Inference Protocol over several backends, which are real gRPC servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

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
from tests.support.tensor_server import TensorServer, serving

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


async def count_prompt(_choice: Choice, request: GenerationRequest, tenant: str) -> int:
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
        routes = routes_to(*servers)
        service = OpenInference(
            routes=lambda: routes,
            backends=backends,
            recorder=recorder,
            admission=Admission(clock),
            count_prompt=count_prompt,
            cache_salts=CacheSalts(InputHasher(bytes(32))),
            clock=clock,
        )
        yield Mesh(service, bills, recorder)


def request(model: str, **fields: Any) -> Any:
    return service_pb2.ModelInferRequest(
        model_name=model, raw_input_contents=[b"\x00\xff"], **{"id": "mine", **fields}
    )


def routes_to(*servers: TensorServer) -> RouteTable:
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
