"""Fake services behind a real edge; tests set their behaviour."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import grpc
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from typing_extensions import override

from libs.clock import SystemClock
from libs.errors import NotFound, Unavailable
from libs.openai.bodies import CHAT_COMPLETIONS_PATH, MODELS_PATH
from libs.openai.errors import OpenAIDialect
from libs.rpc.access import INFER
from libs.rpc.grpc_http1 import GrpcCall, GrpcHttp1Handler
from libs.rpc.http_api import HttpRoute
from libs.rpc.http_call import HttpCall
from tests.support.edge import RunningEdge, running_edge, serving, serving_http

GENERATE_PATH = "/headrace.inference.v1.InferenceService/Generate"


async def two_deltas(_request: Any, _context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Answers with "Hello" in two deltas."""
    for text in ("Hel", "lo"):
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=text, token_count=1))
    yield inference_pb2.GenerateResponse(
        final=inference_pb2.Final(finish_reason=inference_pb2.FINISH_REASON_STOP)
    )


class BodyPart(NamedTuple):
    """A part of the response body of a chat completion."""

    data: bytes
    content_type: str = "text/event-stream"


async def one_object(_body: bytes) -> AsyncIterator[BodyPart]:
    """Answers with one JSON object, as if `stream` were false."""
    yield BodyPart(b'{"object":"chat.completion"}', "application/json")


def refusing(error: Exception) -> Any:
    """Returns a `generate` function that fails before the first message."""

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for message in list[inference_pb2.GenerateResponse]():  # makes it a generator
            yield message
        raise error

    return generate


class Inference:
    """Answers as the test sets it; stores the metadata of the last call."""

    def __init__(self) -> None:
        self.generate: Any = two_deltas
        self.metadata: dict[str, Any] = {}
        self.calls = 0

    async def handle(self, request: inference_pb2.GenerateRequest, context: GrpcCall) -> None:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())
        async with aclosing(self.generate(request, context)) as messages:
            async for message in messages:
                await context.write(message)


class Chat:
    """Answers as the test sets it; stores the last body."""

    def __init__(self) -> None:
        self.answer: Any = one_object
        self.body = b""

    async def handle(self, call: HttpCall) -> None:
        self.body = call.body
        async for part in self.answer(call.body):
            await call.send_chunk(part.data, content_type=part.content_type)


class Models:
    """Has the model `smollm2`."""

    async def list_models(self, call: HttpCall) -> None:
        call.respond(b'{"object":"list"}')

    async def get_model(self, call: HttpCall) -> None:
        model = call.parameter
        if model.partition("@")[0] not in ("smollm2", "models/smollm2/versions/1.0.0"):
            raise NotFound(
                f"no model {model}",
                reason="MODEL_NOT_FOUND",
                metadata={"model": model, "models": "smollm2"},
            )
        call.respond(json.dumps({"id": model}).encode())


async def no_work(_context: Any) -> None:
    """Does nothing."""


class Cost(cost_pb2_grpc.CostServiceServicer):
    """Refuses calls as often as the test sets, then does the work that the test sets."""

    def __init__(self) -> None:
        self.refusals_left = 0
        self.work: Any = no_work

    @override
    async def ListPrices(self, _request: Any, context: Any) -> cost_pb2.ListPricesResponse:
        self._refuse()
        await self.work(context)
        return cost_pb2.ListPricesResponse()

    @override
    async def CreatePrice(self, request: Any, _context: Any) -> cost_pb2.CreatePriceResponse:
        self._refuse()
        return cost_pb2.CreatePriceResponse(price=request.price)

    def _refuse(self) -> None:
        if self.refusals_left:
            self.refusals_left -= 1
            raise Unavailable("not yet", reason="DEPENDENCY_UNAVAILABLE", retry_after_seconds=0.1)


async def one_text() -> AsyncIterator[str]:
    """Yields the name of one job."""
    yield "x"


class Jobs(jobs_pb2_grpc.JobServiceServicer):
    """Streams jobs with names that the test sets, over gRPC."""

    def __init__(self) -> None:
        self.watch: Any = one_text

    @override
    async def GetJob(self, _request: Any, _context: Any) -> jobs_pb2.GetJobResponse:
        return jobs_pb2.GetJobResponse(job=jobs_pb2.Job(name="x"))

    @override
    async def WatchJob(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        async for text in self.watch():
            yield jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(name=text))


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Counts the bytes of uploads."""

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
    """An edge, the services behind it, and clients of the edge."""

    def __init__(self) -> None:
        self.inference = Inference()
        self.chat = Chat()
        # RPCs that a fake does not implement return UNIMPLEMENTED.
        self.cost = Cost()  # type: ignore[abstract]  # see above
        self.registry = Registry()  # type: ignore[abstract]  # see above
        self.jobs = Jobs()  # type: ignore[abstract]  # see above
        self.edge: RunningEdge
        self.channel: grpc.aio.Channel
        self.http: aiohttp.ClientSession

    def serving_inference(self, address: str = "127.0.0.1:0") -> AbstractAsyncContextManager[str]:
        """Serves the HTTP/1.1 routes of inference; yields its `host:port`."""
        generate = GrpcHttp1Handler(
            GENERATE_PATH,
            self.inference.handle,
            request_type=inference_pb2.GenerateRequest,
            clock=SystemClock(),
        )
        models = Models()
        routes = [
            HttpRoute("POST", CHAT_COMPLETIONS_PATH, self.chat.handle, scope=INFER),
            HttpRoute("GET", MODELS_PATH, models.list_models, scope=INFER),
            HttpRoute("GET", f"{MODELS_PATH}/{{model}}", models.get_model, scope=INFER),
        ]
        return serving_http(routes, [generate], address=address, dialect=OpenAIDialect())

    def serving_grpc(self, address: str = "127.0.0.1:0") -> AbstractAsyncContextManager[str]:
        """Serves the gRPC port of inference, with health only; yields its `host:port`."""
        return serving(address=address)

    def serving_control(self, address: str = "127.0.0.1:0") -> AbstractAsyncContextManager[str]:
        """Serves cost, jobs and registry on one server; yields its `host:port`."""

        def register(server: grpc.aio.Server) -> None:
            cost_pb2_grpc.add_CostServiceServicer_to_server(self.cost, server)
            registry_pb2_grpc.add_RegistryServiceServicer_to_server(self.registry, server)
            jobs_pb2_grpc.add_JobServiceServicer_to_server(self.jobs, server)

        return serving(register, address=address)


@asynccontextmanager
async def scripted_mesh(home: Path, **settings: Any) -> AsyncIterator[ScriptedMesh]:
    """Runs inference, cost, jobs and registry behind an edge; the other services do not run."""
    mesh = ScriptedMesh()
    async with (
        mesh.serving_inference() as inference,
        mesh.serving_grpc() as grpc_side,
        mesh.serving_control() as control,
        running_edge(
            home,
            {
                "inference": [grpc_side],
                "inference_http": [inference],
                "cost": [control],
                "registry": [control],
                "jobs": [control],
            },
            **settings,
        ) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
        mesh.edge.session() as mesh.http,
    ):
        yield mesh
