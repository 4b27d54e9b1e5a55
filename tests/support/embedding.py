"""Runs the embedding cache as a process, with fake services as its dependencies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from headrace.common.v1 import embedding_pb2 as common_embedding_pb2
from headrace.common.v1 import model_pb2, usage_pb2
from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc, cost_pb2
from headrace.embedding.v1 import embedding_pb2_grpc
from headrace.inference.v1 import inference_internal_pb2, inference_internal_pb2_grpc
from headrace.router.v1 import router_internal_pb2 as router_pb2
from headrace.router.v1 import router_internal_pb2_grpc as router_pb2_grpc
from typing_extensions import override

from libs.rpc.identity import Identity
from tests.support.backends import triton_backend
from tests.support.edge import serving

DIMENSIONS = 384
DIGEST = "sha256:" + "ab" * 32
CHAT_DIGEST = "sha256:" + "cd" * 32
PRICE = cost_pb2.Price(
    name="prices/minilm",
    model="minilm",
    rates=[
        cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=20_000_000, per_quantity=1_000_000
        ),
        cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS,
            nano_usd=2_000_000,
            per_quantity=1_000_000,
        ),
    ],
)
ANN = Identity("acme", "ann", frozenset({"infer"}))
START_SECONDS = 20.0
STOP_SECONDS = 10.0
_ROOT = Path(__file__).parents[2]


def vector_of(text: str) -> list[float]:
    """Returns the vector that `Inference` computes for a text: exact float32, from its digest."""
    digest = hashlib.shake_256(text.encode()).digest(DIMENSIONS)
    floats = struct.Struct(f"<{DIMENSIONS}f")
    return list(floats.unpack(floats.pack(*((byte - 127.7) / 2999 for byte in digest))))


def tokens_of(text: str) -> int:
    """Returns the number of tokens that `Inference` counts."""
    return len(text.split())


class Inference(inference_internal_pb2_grpc.InferenceInternalServiceServicer):
    """A fake that computes vectors; tests can block it, make it fail and read its requests.

    Attributes:
        batches: the model and texts of each call.
        unblocked: calls wait until it is set.
        seconds: how long each call takes.
        block_after: after so many more calls `unblocked` is cleared; None: never.
        cancelled: number of calls that were cancelled while they waited.
        error: raised instead of an answer.
        digest: artifact digest in responses.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[str]]] = []
        self.metadata: dict[str, Any] = {}
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.seconds = 0.0
        self.block_after: int | None = None
        self.cancelled = 0
        self.error: Exception | None = None
        self.digest = DIGEST

    @override
    async def Embed(self, request: Any, context: Any) -> inference_internal_pb2.EmbedResponse:
        self.batches.append((request.model, list(request.texts)))
        self.metadata = dict(context.invocation_metadata())
        if self.block_after is not None:
            if not self.block_after:
                self.unblocked.clear()
                self.block_after = None
            else:
                self.block_after -= 1
        try:
            await asyncio.sleep(self.seconds)
            await self.unblocked.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return inference_internal_pb2.EmbedResponse(
            embeddings=[
                common_embedding_pb2.Embedding(values=vector_of(text), token_count=tokens_of(text))
                for text in request.texts
            ],
            artifact_digest=self.digest,
        )


class Router(router_pb2_grpc.RouterInternalServiceServicer):
    """Pushes one snapshot: `minilm` and `smollm2` are ready, `later` is not."""

    @override
    async def WatchRoutes(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        yield router_pb2.WatchRoutesResponse(
            revision=1,
            routes=[
                _route("minilm", DIGEST, model_pb2.MODEL_KIND_EMBEDDING, ready=True),
                _route("smollm2", CHAT_DIGEST, model_pb2.MODEL_KIND_CHAT, ready=True),
                _route("later", DIGEST, model_pb2.MODEL_KIND_EMBEDDING, ready=False),
            ],
        )
        await asyncio.Event().wait()


class Cost(cost_internal_pb2_grpc.CostInternalServiceServicer):
    """Pushes one price book."""

    @override
    async def WatchPrices(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        yield cost_internal_pb2.WatchPricesResponse(prices=[PRICE])
        await asyncio.Event().wait()


def _route(model: str, digest: str, kind: Any, *, ready: bool) -> router_pb2.ModelRoute:
    return router_pb2.ModelRoute(
        model=model,
        targets=[
            router_pb2.RouteTarget(
                deployment=f"deployments/{model}",
                model_version=f"models/{model}/versions/1.0.0",
                artifact_digest=digest,
                schema=model_pb2.ModelSchema(kind=kind, dimensions=DIMENSIONS),
                backends=[triton_backend("triton-0", "127.0.0.1:1")] if ready else [],
            )
        ],
    )


class Peers:
    """The dependencies of the embedding cache, in one server."""

    def __init__(self) -> None:
        self.inference = Inference()

    def register(self, server: grpc.aio.Server) -> None:
        """Registers all servicers."""
        # RPCs that a fake does not implement return UNIMPLEMENTED.
        inference_internal_pb2_grpc.add_InferenceInternalServiceServicer_to_server(
            self.inference, server
        )
        router_pb2_grpc.add_RouterInternalServiceServicer_to_server(Router(), server)
        cost_internal_pb2_grpc.add_CostInternalServiceServicer_to_server(Cost(), server)


@dataclass
class EmbeddingCache:
    """A running process.

    Attributes:
        http_address: address of its HTTP server.
        address: address of its gRPC server.
        lines: its log so far.
    """

    process: asyncio.subprocess.Process
    metrics_url: str
    http_address: str
    address: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    channel: grpc.aio.Channel = field(init=False)

    @property
    def stub(self) -> embedding_pb2_grpc.EmbeddingServiceAsyncStub:
        return embedding_pb2_grpc.EmbeddingServiceStub(self.channel)

    async def read_log(self, serving_now: asyncio.Event) -> None:
        """Reads the log until the process ends; sets the event when the process serves."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            entry = json.loads(line)
            self.lines.append(entry)
            if entry["event"] == "serving":
                self.address = entry["address"]
                serving_now.set()

    async def stop(self) -> None:
        """Stops the process as the supervisor does; kills it if that takes too long."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            raise


@asynccontextmanager
async def running_embedding_cache(
    home: Path, *, peers_address: str, nats_url: str, **environment: str
) -> AsyncIterator[EmbeddingCache]:
    """Runs `python -m services.embedding_cache` on free ports, with its files in `home`."""
    key_file = home / "input-hash.key"
    key_file.write_bytes(secrets.token_bytes(32))
    metrics_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
    peers = ("ROUTER_ADDRESS", "COST_ADDRESS", "INFERENCE_ADDRESS")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.embedding_cache",
        cwd=_ROOT,
        stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": "libs/gen",
            "HEADRACE_HOME": str(home),
            "HEADRACE_PLAINTEXT": "true",
            "HEADRACE_LISTEN_ADDRESS": "127.0.0.1:0",
            "HEADRACE_HTTP_LISTEN_ADDRESS": http_address,
            "HEADRACE_METRICS_ADDRESS": metrics_address,
            "HEADRACE_INPUT_HASH_KEY_FILE": str(key_file),
            "HEADRACE_NATS_URL": nats_url,
            **{f"HEADRACE_{name}": peers_address for name in peers},
            **environment,
        },
    )
    cache = EmbeddingCache(process, f"http://{metrics_address}/metrics", http_address)
    serving_now = asyncio.Event()
    reading = asyncio.create_task(cache.read_log(serving_now))
    try:
        async with asyncio.timeout(START_SECONDS):
            await serving_now.wait()
        async with grpc.aio.insecure_channel(cache.address) as cache.channel:
            yield cache
    finally:
        await cache.stop()
        await reading


def free_port() -> int:
    """Returns a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serving_peers(peers: Peers, *, address: str = "127.0.0.1:0") -> Any:
    """Runs the peers; yields their address."""
    return serving(peers.register, address=address)


async def eventually(holds: Callable[[], Awaitable[bool] | bool]) -> None:
    """Returns when a condition holds."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.02)
