"""Embeddings of texts, divided into parts so that requests of others run between them.

A backend cannot stop in the middle of a part. One whose caller leaves is left to end, with its
slot; what it computed is billed to the caller, as are the parts before it, also where the caller's
deadline or limits ended the request. The rest is not started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.common.v1 import model_pb2

from libs.background import start_task
from libs.clock import Clock
from libs.embedding_texts import MAX_TEXTS, check_text_sizes
from libs.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from libs.ids import uuid7
from libs.routes import Choice, RouteTable
from libs.rpc.identity import Identity
from services.inference.accounting import Outcome, Recorder
from services.inference.admission import Admission
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import Route, TokenUsage
from services.inference.routing import route_of
from services.inference.slots import PARTS_IN_FLIGHT, Demand
from services.inference.tensors.retry import Retrier
from services.inference.work import next_part, size_bytes

# The largest batch that the model's configuration in Triton allows.
BATCH_TEXTS = 64
# Parts of a request that run or wait at a time: one waits besides those that keep backends busy.
PARTS_AT_ONCE = PARTS_IN_FLIGHT + 1

Vectors = Sequence[tuple[bytes, int]]


@dataclass(frozen=True)
class Embeddings:
    """Vectors in the order of their texts.

    Attributes:
        vectors: of each text its vector, as little-endian float32, and its number of tokens.
        route: which version computed them.
    """

    vectors: Vectors
    route: Route


class Embedder:
    """Computes embeddings."""

    def __init__(
        self,
        *,
        routes: Callable[[], RouteTable],
        backends: Backends,
        admission: Admission,
        recorder: Recorder,
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)
        self._admission = admission
        self._recorder = recorder
        self._clock = clock
        self._abandoned: set[asyncio.Task[None]] = set()

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        identity: Identity,
        *,
        deadline_seconds: float | None = None,
    ) -> Embeddings:
        """Returns one vector for each text.

        Args:
            model: a model reference.
            texts: 1 to `MAX_TEXTS`.
            identity: for whom; pays where it does not wait for the answer.
            deadline_seconds: the caller's deadline, on the clock's monotonic time.

        Raises:
            HeadraceError: see `InferenceService.Embed`.
        """
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidArgument.of_field("texts", f"must have 1 to {MAX_TEXTS} texts")
        choice = self._routes().choose(model, kind=model_pb2.MODEL_KIND_EMBEDDING)
        check_text_sizes(
            texts, max_input_tokens=choice.target.schema.max_input_tokens, field="texts"
        )
        parts = _Parts(self._admission, choice, texts, identity.tenant, deadline_seconds)
        started_seconds = self._clock.monotonic_seconds()
        try:
            with self._admission.hold(identity.tenant, sum(map(size_bytes, texts))):
                await self._run(parts)
        except (asyncio.CancelledError, DeadlineExceeded, ResourceExhausted) as error:
            # Else the parts before would be free for those whose deadlines are short.
            if parts.was_started or isinstance(error, asyncio.CancelledError):
                self._bill_later(parts, identity, started_seconds, error)
            raise
        return Embeddings(parts.vectors(), route_of(choice))

    async def drain(self) -> None:
        """Returns when the parts that were left to end have ended."""
        await asyncio.gather(*self._abandoned, return_exceptions=True)

    async def _run(self, parts: _Parts) -> None:
        async def work() -> None:
            while (part := parts.next()) is not None:
                part.task = asyncio.create_task(self._compute(parts, part))
                part.task.add_done_callback(_mark_error_as_retrieved)
                try:
                    # Cancelling this does not cancel the part.
                    await asyncio.shield(part.task)
                except asyncio.CancelledError:
                    if not part.is_running:
                        part.task.cancel()
                    raise

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(PARTS_AT_ONCE, len(parts.texts))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first error is enough, and has a status

    async def _compute(self, parts: _Parts, part: _Part) -> None:
        async def attempt(lease: Lease) -> list[tuple[bytes, int]]:
            return await lease.triton.embed(
                lease.target.model, part.texts, deadline_seconds=parts.deadline_seconds
            )

        async with self._admission.slot(parts.choice.target, part.demand):
            part.is_running = True
            part.vectors = await self._retrier.run(parts.choice, attempt)

    def _bill_later(
        self, parts: _Parts, identity: Identity, started_seconds: float, error: BaseException
    ) -> None:
        async def bill() -> None:
            await asyncio.gather(*parts.tasks(), return_exceptions=True)
            tokens = sum(count for _, count in parts.vectors())
            self._recorder.record_later(
                Outcome(
                    operation="embed",
                    request_id=uuid7(self._clock),
                    identity=identity,
                    choice=parts.choice,
                    usage=TokenUsage(prompt_tokens=tokens),
                    inputs=tuple(parts.texts),
                    started_seconds=started_seconds,
                    error=error,
                )
            )

        task = start_task(bill(), name="bill abandoned embeddings")
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)


@dataclass(eq=False)
class _Part:
    """Texts that a backend embeds together.

    Attributes:
        is_running: it has a slot.
        vectors: once they are known.
    """

    texts: Sequence[str]
    demand: Demand
    is_running: bool = False
    vectors: Vectors = ()
    task: asyncio.Task[None] | None = None


class _Parts:
    """The parts of a request. Each is made when it is about to wait, of the size that fits then."""

    def __init__(
        self,
        admission: Admission,
        choice: Choice,
        texts: Sequence[str],
        tenant: str,
        deadline_seconds: float | None,
    ) -> None:
        self.choice = choice
        self.texts = texts
        self.deadline_seconds = deadline_seconds
        self._queue = admission.queue(choice.target)
        self._tenant = tenant
        self._parts: list[_Part] = []
        self._next = 0

    def next(self) -> _Part | None:
        """Returns the next part; None: all have been made."""
        if self._next == len(self.texts):
            return None
        count, work = next_part(
            self.texts[self._next : self._next + BATCH_TEXTS],
            max_input_tokens=self.choice.target.schema.max_input_tokens,
            part_work=self._queue.part_work,
        )
        part = _Part(
            self.texts[self._next : self._next + count],
            Demand(
                tenant=self._tenant,
                work=work,
                deadline_seconds=self.deadline_seconds,
                is_part=bool(self._parts),  # the request is refused as a whole, with its first part
            ),
        )
        self._next += count
        self._parts.append(part)
        return part

    @property
    def was_started(self) -> bool:
        """Whether a backend has received a part."""
        return any(part.is_running for part in self._parts)

    def tasks(self) -> list[asyncio.Task[None]]:
        """Returns the tasks of all parts that were made."""
        return [part.task for part in self._parts if part.task is not None]

    def vectors(self) -> Vectors:
        """Returns the vectors of all parts that have some, in the order of the texts."""
        return [vector for part in self._parts for vector in part.vectors]


def _mark_error_as_retrieved(task: asyncio.Task[None]) -> None:
    # The request has the first error; asyncio would log the others.
    if not task.cancelled():
        task.exception()
