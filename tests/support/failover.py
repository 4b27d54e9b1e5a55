"""Failover over real backends, without the servers around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.routes import RouteTable
from services.inference import metrics
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.domain import ChatCall
from services.inference.generation.failover import DeploymentCall, Failover
from services.inference.generation.hedging import (
    HedgeLimits,
)
from services.inference.generation.relay import Relay
from tests.support.backends import provider_backend, triton_backend
from tests.support.provider import MockProvider
from tests.support.triton import MockTriton

CALL = ChatCall(
    request_id="r", request=GenerationRequest(model="m", messages=(Message("user", "hello"),))
)
STALL = StallLimits(first_token_seconds=0.4, between_tokens_seconds=0.3)
NO_HEDGE = HedgeLimits()


@dataclass
class Answer:
    text: str = ""
    call: DeploymentCall | None = None


@dataclass
class Mesh:
    """Failover over backends, without the servers around it."""

    backends: Backends
    failover: Failover
    table: RouteTable
    targets: list[Backend] = field(default_factory=list)

    async def ask(self, answer: Answer | None = None) -> Answer:
        """Runs one answer and returns it; `answer` has what was delivered before an error."""
        answer = answer or Answer()
        relay = Relay()
        choice = self.table.choose("m", kind=MODEL_KIND_CHAT)
        answer.call = self.failover.call(CALL, choice, has_fallback=False)

        async def read() -> None:
            while (chunk := await relay.take()) is not None:
                answer.text += chunk.text

        reader = asyncio.create_task(read())
        try:
            await answer.call.run(relay)
        finally:
            relay.close()
            await reader
        return answer

    def route(self, targets: Sequence[Backend]) -> None:
        """Replaces the routes: one model, one version."""
        target = RouteTarget(
            deployment="deployments/d",
            model_version="models/m/versions/1.0.0",
            schema=ModelSchema(kind=MODEL_KIND_CHAT, max_output_tokens=100),
            backends=targets,
        )
        self.targets = list(targets)
        self.table = RouteTable(
            epoch="e", revision=1, routes=[ModelRoute(model="m", targets=[target])]
        )


@asynccontextmanager
async def mesh_of(
    *servers: MockProvider | MockTriton, tmp_path: Path, hedge: HedgeLimits = NO_HEDGE
) -> AsyncIterator[Mesh]:
    clock = SystemClock()
    backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=STALL)
    failover = Failover(backends=backends, routes=lambda: mesh.table, hedge=hedge, clock=clock)
    mesh = Mesh(backends, failover, RouteTable(epoch="e", revision=0, routes=[]))
    mesh.route([backend_of(server, f"b{index}") for index, server in enumerate(servers)])
    try:
        yield mesh
    finally:
        await backends.close()


def backend_of(server: MockProvider | MockTriton, identifier: str) -> Backend:
    if isinstance(server, MockTriton):
        return triton_backend(identifier, server.address, model="m-1.0.0-abc")
    return provider_backend(identifier, server.base_url, model="upstream")


def state_of(mesh: Mesh, index: int) -> float:
    """Returns the state of a breaker, as Prometheus sees it: 0 closed, 1 half-open, 2 open."""
    backend = mesh.targets[index]
    gauge = metrics.BREAKER_STATE.labels(backend.provider.base_url, backend.provider.model)
    (metric,) = gauge.collect()
    return float(metric.samples[0].value)
