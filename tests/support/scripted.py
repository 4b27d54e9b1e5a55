"""Small real services behind a real edge. A test sets what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf import empty_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.openai.v1 import openai_pb2, openai_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from typing_extensions import override

from libs.errors import NotFound, Unavailable
from libs.http.exchange import Exchange
from libs.openai.bodies import CHAT_COMPLETIONS_PATH
from tests.support.edge import RunningEdge, running_edge, serving, serving_http


async def two_deltas(_request: Any, _context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Answers with "Hello" in two parts, as services do."""
    for text in ("Hel", "lo"):
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=text, token_count=1))
    yield inference_pb2.GenerateResponse(final=inference_pb2.Final(finish_reason="stop"))


async def one_object(_body: bytes) -> AsyncIterator[HttpBody]:
    """Answers with one JSON object, as where `stream` is false."""
    yield HttpBody(content_type="application/json", data=b'{"object":"chat.completion"}')


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Generates what the test says and keeps the metadata of the last call."""

    def __init__(self) -> None:
        self.generate: Any = two_deltas
        self.metadata: dict[str, Any] = {}
        self.calls = 0

    @override
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())
        async for message in self.generate(request, context):
            yield message


class Chat:
    """Answers what the test says and keeps the last body."""

    def __init__(self) -> None:
        self.answer: Any = one_object
        self.body = b""

    async def handle(self, exchange: Exchange) -> None:
        self.body = exchange.body
        async for part in self.answer(exchange.body):
            await exchange.part(part.data, content_type=part.content_type)


class Models(openai_pb2_grpc.ModelServiceServicer):
    """Knows the model `smollm2`."""

    @override
    async def ListModels(self, _request: empty_pb2.Empty, _context: Any) -> HttpBody:
        return HttpBody(content_type="application/json", data=b'{"object":"list"}')

    @override
    async def GetModel(self, request: openai_pb2.GetModelRequest, _context: Any) -> HttpBody:
        if request.model.partition("@")[0] != "smollm2":
            raise NotFound(
                f"no model {request.model}",
                reason="MODEL_NOT_FOUND",
                metadata={"model": request.model, "models": "smollm2"},
            )
        return HttpBody(
            content_type="application/json", data=f'{{"id":"{request.model}"}}'.encode()
        )


class Cost(cost_pb2_grpc.CostServiceServicer):
    """Refuses as often as the test says, then answers."""

    def __init__(self) -> None:
        self.refusals_left = 0

    @override
    async def ListPrices(self, _request: Any, _context: Any) -> cost_pb2.ListPricesResponse:
        self._refuse()
        return cost_pb2.ListPricesResponse()

    @override
    async def CreatePrice(self, request: Any, _context: Any) -> cost_pb2.CreatePriceResponse:
        self._refuse()
        return cost_pb2.CreatePriceResponse(price=request.price)

    def _refuse(self) -> None:
        if self.refusals_left:
            self.refusals_left -= 1
            raise Unavailable("not yet", reason="DEPENDENCY_UNAVAILABLE", retry_after_seconds=0.1)


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Counts the bytes of what is uploaded."""

    @override
    async def UploadArtifact(
        self, request_iterator: Any, _context: Any
    ) -> registry_pb2.UploadArtifactResponse:
        digest, size = "", 0
        async for request in request_iterator:
            digest = request.metadata.digest or digest
            size += len(request.chunk)
        return registry_pb2.UploadArtifactResponse(digest=digest, size_bytes=size)


class ScriptedMesh:
    """An edge, the services behind it, and clients of it."""

    def __init__(self) -> None:
        # What a service does not define answers UNIMPLEMENTED.
        self.inference = Inference()  # type: ignore[abstract]  # see above
        self.chat = Chat()
        self.cost = Cost()  # type: ignore[abstract]  # see above
        self.edge: RunningEdge
        self.channel: grpc.aio.Channel
        self.http: aiohttp.ClientSession

    def add_inference(self, server: grpc.aio.Server) -> None:
        """Registers what the inference process serves."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, server)
        openai_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)

    def add_control(self, server: grpc.aio.Server) -> None:
        """Registers the control services that tests call, in one process."""
        cost_pb2_grpc.add_CostServiceServicer_to_server(self.cost, server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            Registry(),  # type: ignore[abstract]  # see above
            server,
        )


@asynccontextmanager
async def scripted_mesh(home: Path, **settings: Any) -> AsyncIterator[ScriptedMesh]:
    """Runs inference, cost and registry behind an edge; the other services do not run."""
    mesh = ScriptedMesh()
    async with (
        serving(mesh.add_inference) as inference,
        serving(mesh.add_control) as control,
        serving_http({CHAT_COMPLETIONS_PATH: mesh.chat.handle}) as http,
        running_edge(
            home,
            {
                "inference": [inference],
                "inference_http": [http],
                "cost": [control],
                "registry": [control],
            },
            **settings,
        ) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
        aiohttp.ClientSession(mesh.edge.url) as mesh.http,
    ):
        yield mesh
