"""Receives messages of the Open Inference Protocol, which may be large.

gRPC reveals the size of a message only when all of it is in memory. So nothing more is read for a
tenant whose requests hold all the memory that it may have: HTTP/2's flow control makes its client
wait. Of its unary calls, whose message arrives with the call, few are read at the same time. A
stream may be silent for long before its next message, so the streams of a tenant do not wait for
each other: what they send at the same moment is received. Therefore their number is limited, and
their messages are smaller (`stream_message_limit_bytes`).

Unary calls that wait to be read are limited, too: the edge has a number of requests at a time for
all tenants (`MAX_REQUESTS`, 4,096), which calls that nobody answers must not fill.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.runtime import return_free_memory
from libs.shared_limit import SharedLimit
from services.inference.slots import REQUEST_OVERHEAD_BYTES, take_memory

CALLS_AT_ONCE = 2
# Unary calls that are received or wait for that; a tenant alone gets half of them.
MAX_CALLS = 1024
CALLS_ALPHA = 1.0
DEFAULT_MAX_STREAMS = 64
# A tenant alone gets half of the streams.
STREAMS_ALPHA = 1.0
POLL_SECONDS = 0.02
RETRY_SECONDS = 1.0
# A message that has arrived, but is not counted, takes memory, too.
MEMORY_WAIT_SECONDS = 5.0
# A message is in memory as it was received, renamed, and as it is sent to a backend.
COPIES = 3
# gRPC receives a message in small pieces, which fragment the heap.
LARGE_BYTES = 8 * 1024 * 1024

Read = Callable[[], Awaitable[bytes | None]]
Refuse = Callable[[ResourceExhausted, bytes], Awaitable[None]]


class _Turns:
    """Which unary calls of one tenant are read now, and how many wait for that or are read."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(CALLS_AT_ONCE)
        self.users = 0


class Arrivals:
    """Receives the messages of all tenants, and counts their memory until they are released."""

    def __init__(
        self, memory: SharedLimit, clock: Clock, *, max_streams: int = DEFAULT_MAX_STREAMS
    ) -> None:
        """Makes it.

        Args:
            memory: counts what the requests of tenants hold, in bytes.
            clock: the time.
            max_streams: of all tenants together.
        """
        self._memory = memory
        self._streams = SharedLimit(max_streams, alpha=STREAMS_ALPHA)
        self._calls = SharedLimit(MAX_CALLS, alpha=CALLS_ALPHA)
        self._clock = clock
        self._turns: dict[str, _Turns] = {}

    async def only(self, tenant: str, read: Read) -> bytes | None:
        """Returns the message of a unary call, which is to be released; None: it has none.

        Args:
            tenant: who sends it.
            read: reads the message.

        Raises:
            ResourceExhausted: as many calls of the tenant wait as may, or there is no memory for
                the message (`QUEUE_FULL`).
        """
        message = (
            "{limit} calls of the tenant wait to be read, which is its limit; try again when "
            "others have ended"
        )
        with _counted(self._calls, tenant, queue="ModelInfer", message=message):
            async with self._turn(tenant):
                return await self.next(tenant, read)

    async def next(self, tenant: str, read: Read, *, refuse: Refuse | None = None) -> bytes | None:
        """Returns the next message of a stream, as `only`. Others need not wait for it.

        Args:
            tenant: who sends it.
            read: reads a message.
            refuse: answers a message for which there is no memory; the next one is read then.
                None: the error is raised.

        Raises:
            ResourceExhausted: there is no memory for the message (`QUEUE_FULL`).
        """
        while True:
            while not self._memory.has_room(tenant):
                await self._clock.sleep(POLL_SECONDS)
            message = await read()
            if message is None:
                return None
            try:
                await self._take_memory(tenant, _held_bytes(message))
            except ResourceExhausted as error:
                if refuse is None:
                    raise
                await refuse(error, message)
                del message  # the next one may come much later
            else:
                return message

    def stream(self, tenant: str) -> AbstractContextManager[None]:
        """Returns a context manager that counts a stream of a tenant while it is open.

        Raises:
            ResourceExhausted: on entry: it has as many as it may have (`QUEUE_FULL`).
        """
        message = (
            "the tenant has {limit} open streams of tensors, which is its limit; send more "
            "requests over each stream, or try again when one has ended"
        )
        return _counted(self._streams, tenant, queue="ModelStreamInfer", message=message)

    def release(self, tenant: str, message: bytes) -> None:
        """Releases the memory of a message."""
        self._memory.release(tenant, _held_bytes(message))
        if len(message) >= LARGE_BYTES:  # the caller still has it, but not for long
            asyncio.get_running_loop().call_later(POLL_SECONDS, return_free_memory)

    async def _take_memory(self, tenant: str, size_bytes: int) -> None:
        """Waits for memory.

        Raises:
            ResourceExhausted: there is none for long, or never so much.
        """
        until = self._clock.monotonic_seconds() + MEMORY_WAIT_SECONDS
        while size_bytes <= self._memory.limit and self._clock.monotonic_seconds() < until:
            if self._memory.take(tenant, size_bytes):
                return
            await self._clock.sleep(POLL_SECONDS)
        take_memory(self._memory, tenant, size_bytes)

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        turns = self._turns.get(tenant)
        if turns is None:
            turns = self._turns[tenant] = _Turns()
        turns.users += 1
        try:
            async with turns.free:
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                del self._turns[tenant]


@contextmanager
def _counted(shared: SharedLimit, tenant: str, *, queue: str, message: str) -> Iterator[None]:
    """Counts a call of a tenant while the block runs.

    Raises:
        ResourceExhausted: on entry, with the message, in which `{limit}` is replaced.
    """
    if not shared.take(tenant):
        limit = shared.share_of(tenant)
        raise ResourceExhausted.of_queue(
            queue,
            message.format(limit=limit),
            limit=limit,
            retry_after_seconds=RETRY_SECONDS,
        )
    try:
        yield
    finally:
        shared.release(tenant)


def _held_bytes(message: bytes) -> int:
    return COPIES * len(message) + REQUEST_OVERHEAD_BYTES
