"""Answers a request for vectors, independent of its protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import structlog
from headrace.common.v1 import model_pb2, usage_pb2

from libs.background import start_task
from libs.clock import Clock
from libs.embedding_texts import check_text_sizes, check_texts
from libs.errors import HeadraceError, ResourceExhausted
from libs.ids import check_uuid, uuid7
from libs.metering.usage import UsageRecorder
from libs.routes import Choice, RouteTable
from libs.shared_limit import SharedLimit
from libs.telemetry.genai import OPERATION_EMBEDDINGS, ModelMetrics
from libs.telemetry.hashing import InputHasher
from libs.telemetry.tracing import current_trace_id
from services.embedding_cache import metrics
from services.embedding_cache.domain import (
    RETRY_SECONDS,
    SHARED,
    Caller,
    Lookup,
    Vector,
    check_dimensions,
    text_keys,
)
from services.embedding_cache.inference_client import InferenceClient
from services.embedding_cache.query import Answer, Query
from services.embedding_cache.single_flight import SingleFlight
from services.embedding_cache.vector_cache import VectorCache

_log = structlog.get_logger()

MEMORY_ALPHA = 1.0
# What a text needs besides its characters: its key, its vector, and its part of the response.
TEXT_OVERHEAD_BYTES = 4096
REQUEST_OVERHEAD_BYTES = 16 * 1024


class Embedder:
    """Answers requests from the cache, computes what is missing, and records the usage."""

    def __init__(
        self,
        *,
        routes: Callable[[], RouteTable],
        cache: VectorCache,
        single_flight: SingleFlight,
        inference: InferenceClient,
        usage: UsageRecorder,
        hasher: InputHasher,
        shared_models: Collection[str],
        memory_limit_bytes: int,
        clock: Clock,
    ) -> None:
        """Makes an embedder.

        Args:
            routes: returns the current routes.
            cache: the vectors in memory.
            single_flight: shares computations; must store their vectors in `cache`.
            inference: computes vectors.
            usage: prices and records usage.
            hasher: hashes inputs for the log.
            shared_models: public names of models whose vectors tenants share: a tenant then learns
                which texts others have embedded. The vectors of all other models are each tenant's.
            memory_limit_bytes: what all requests hold together; a tenant alone gets half of it.
            clock: measures durations and dates request IDs.
        """
        self._routes = routes
        self._cache = cache
        self._single_flight = single_flight
        self._inference = inference
        self._usage = usage
        self._hasher = hasher
        self._shared_models = frozenset(shared_models)
        self._memory = SharedLimit(memory_limit_bytes, alpha=MEMORY_ALPHA)
        self._recording: set[asyncio.Task[int]] = set()
        self._clock = clock
        self._metrics: dict[tuple[str, str], ModelMetrics] = {}

    async def embed(self, query: Query) -> Answer:
        """Answers one request.

        Raises:
            HeadraceError: the errors of `EmbeddingService.Embed`.
        """
        started = self._clock.monotonic_seconds()
        if query.request_id:
            check_uuid(query.request_id, field="request_id")
        check_texts(query.texts, field=query.texts_field)
        choice = self._routes().choose(query.model, kind=model_pb2.ModelKind.MODEL_KIND_EMBEDDING)
        schema = choice.target.schema
        check_dimensions(query.dimensions, schema.dimensions)
        check_text_sizes(
            query.texts, max_input_tokens=schema.max_input_tokens, field=query.texts_field
        )
        model_metrics = self._metrics_of(choice)
        try:
            with self._held(query):
                answer = await self._answer(query, choice)
        except HeadraceError as error:
            seconds = self._clock.monotonic_seconds() - started
            model_metrics.observe_request(seconds, error_type=error.reason)
            raise
        seconds = self._clock.monotonic_seconds() - started
        model_metrics.observe_request(seconds)
        self._log(query, answer, seconds)
        return answer

    async def drain(self) -> None:
        """Returns when the usage of requests that were abandoned is recorded, or has failed."""
        await asyncio.gather(*self._recording, return_exceptions=True)

    @contextmanager
    def _held(self, query: Query) -> Iterator[None]:
        """Counts the memory of a request against the limit of its tenant, while the block runs."""
        tenant = query.identity.tenant
        size_bytes = _memory_bytes(query.texts)
        if not self._memory.take(tenant, size_bytes):
            share = self._memory.share_of(tenant)
            raise ResourceExhausted.of_queue(
                "embedding_cache.memory",
                f"the requests of this tenant hold {self._memory.held_by(tenant)} bytes of memory, "
                f"and it may hold about {share} now; send fewer or smaller ones at a time",
                limit=share,
                retry_after_seconds=RETRY_SECONDS,
            )
        try:
            yield
        finally:
            self._memory.release(tenant, size_bytes)

    async def _answer(self, query: Query, choice: Choice) -> Answer:
        request_id = query.request_id or uuid7(self._clock)
        lookup = await self._look_up(query, choice, request_id)
        usage = usage_pb2.TokenUsage(
            prompt_tokens=lookup.token_count, cached_tokens=lookup.cached_token_count
        )
        cost_nano_usd = await self._record(query, choice, request_id, usage)
        return Answer(
            lookup=lookup,
            choice=choice,
            usage=usage,
            cost_nano_usd=cost_nano_usd,
            request_id=request_id,
            trace_id=current_trace_id(),
        )

    async def _look_up(self, query: Query, choice: Choice, request_id: str) -> Lookup:
        tenant = query.identity.tenant
        caller = Caller(tenant, SHARED if choice.model in self._shared_models else tenant)
        keys = text_keys(choice.target.artifact_digest, caller.owner, query.texts)
        first_index: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            first_index.setdefault(key, index)
        cached = {
            key: vector
            for key in first_index
            if (vector := self._cache.get(caller.owner, key)) is not None
        }
        missing = {key: query.texts[first_index[key]] for key in first_index if key not in cached}
        # No await between the lookup in the cache and `fetch`: no computation ends in between.
        computed = frozenset(first_index[key] for key in missing if key not in self._single_flight)
        _count(texts=len(keys), keys=len(first_index), cached=len(cached), computed=len(computed))

        async def compute(texts: Sequence[str]) -> Sequence[Vector]:
            return await self._inference.embed(texts, choice=choice, identity=query.identity)

        def unpaid(vectors: Sequence[Vector]) -> None:
            tokens = sum(vector.token_count for vector in vectors)
            self._record_later(query, choice, request_id, tokens)

        fetched: Mapping[bytes, Vector] = {}
        if missing:
            fetched = await self._single_flight.fetch(
                missing, compute, caller=caller, unpaid=unpaid
            )
        return Lookup([cached.get(key) or fetched[key] for key in keys], computed)

    async def _record(
        self, query: Query, choice: Choice, request_id: str, usage: usage_pb2.TokenUsage
    ) -> int:
        return await self._usage.record(
            request_id=request_id,
            identity=query.identity,
            model=choice.model,
            model_version=choice.target.model_version,
            usage=usage,
            operation="embed",
        )

    def _record_later(self, query: Query, choice: Choice, request_id: str, tokens: int) -> None:
        """Records what was computed for a request that failed, or whose caller has left."""
        if query.identity.usage_id:  # a job is tried again, and booked once: when it succeeds
            return
        usage = usage_pb2.TokenUsage(prompt_tokens=tokens)
        record = self._record(query, choice, request_id, usage)
        task = start_task(record, name="record abandoned usage")
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    def _metrics_of(self, choice: Choice) -> ModelMetrics:
        # Grows with the versions that requests were routed to.
        labels = (choice.model, choice.target.model_version)
        model_metrics = self._metrics.get(labels)
        if model_metrics is None:
            model_metrics = self._metrics[labels] = ModelMetrics(
                operation=OPERATION_EMBEDDINGS, model=labels[0], model_version=labels[1]
            )
        return model_metrics

    def _log(self, query: Query, answer: Answer, seconds: float) -> None:
        _log.info(
            "embedded",
            request_id=answer.request_id,
            tenant=query.identity.tenant,
            user=query.identity.user,
            model_version=answer.choice.target.model_version,
            input_hash=self._hasher.hash(*query.texts),
            text_count=len(query.texts),
            hit_count=answer.lookup.hit_count,
            prompt_tokens=answer.usage.prompt_tokens,
            cached_tokens=answer.usage.cached_tokens,
            cost_nano_usd=answer.cost_nano_usd,
            duration_seconds=round(seconds, 6),
        )


def _memory_bytes(texts: Sequence[str]) -> int:
    """Returns about what a request holds: its texts, as received and as sent on, and vectors."""
    return 2 * sum(map(len, texts)) + TEXT_OVERHEAD_BYTES * len(texts) + REQUEST_OVERHEAD_BYTES


def _count(*, texts: int, keys: int, cached: int, computed: int) -> None:
    metrics.REPEATED_TEXTS.inc(texts - keys)
    metrics.HIT_TEXTS.inc(cached)
    metrics.COMPUTED_TEXTS.inc(computed)
    metrics.JOINED_TEXTS.inc(keys - cached - computed)
