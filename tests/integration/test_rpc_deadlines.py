"""Deadlines, cancelled calls, and servers that stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from libs.errors import DeadlineExceeded
from libs.rpc import deadlines
from libs.rpc.status import headrace_errors
from tests.support.rpc import Calls, handled_by, value

pytestmark = pytest.mark.integration

LONG_SECONDS = 30


class Work:
    """Handlers that never end by themselves, with events for their start and end."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    async def unary_unary(self, _request: object, _context: object) -> None:
        await self._forever()

    async def unary_stream(self, _request: object, _context: object) -> AsyncIterator[StringValue]:
        yield value("first")
        await self._forever()

    async def stream_unary(self, requests: AsyncIterator[StringValue], _context: object) -> None:
        with self._running():
            async for _ in requests:
                pass

    async def stream_stream(
        self, requests: AsyncIterator[StringValue], _context: object
    ) -> AsyncIterator[StringValue]:
        with self._running():
            async for request in requests:
                yield request

    def handlers(self) -> dict[str, Callable[..., Any]]:
        return {kind: getattr(self, kind) for kind in KINDS}

    async def _forever(self) -> None:
        with self._running():
            await asyncio.sleep(LONG_SECONDS)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.started.set()
        try:
            yield
        finally:
            self.ended.set()


async def never() -> AsyncIterator[StringValue]:
    yield value("first")
    await asyncio.sleep(LONG_SECONDS)


KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def start(calls: Calls, kind: str, **options: Any) -> Any:
    request = never() if kind.startswith("stream") else value("")
    return getattr(calls, kind)(request, **options)


async def end(call: Any, kind: str) -> Any:
    if kind.endswith("stream"):
        return [message async for message in call]
    return await call


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_callee_says_that_the_deadline_passed(kind, traced, monkeypatch):
    """Shortly before the caller gives up, with `ErrorInfo`; the work is cancelled."""
    # A margin that a busy machine keeps, too: the order is the promise here, not the 20 ms.
    monkeypatch.setattr(deadlines, "DEADLINE_MARGIN_SECONDS", 1.5)
    work = Work()
    async with handled_by(traced, **work.handlers()) as calls:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await end(start(calls, kind, timeout=2.0), kind)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(DeadlineExceeded) as raised_error, headrace_errors():
            raise raised.value
        assert raised_error.value.message == "the deadline passed before the work was done"
        async with asyncio.timeout(5):
            await work.ended.wait()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_call_ends_the_work(kind, traced):
    """Its result would not be read."""
    work = Work()
    async with handled_by(traced, **work.handlers()) as calls:
        call = start(calls, kind)
        ending = asyncio.ensure_future(end(call, kind))
        async with asyncio.timeout(5):
            await work.started.wait()
            call.cancel() if hasattr(call, "cancel") else ending.cancel()
            await work.ended.wait()
        await asyncio.gather(ending, return_exceptions=True)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_task_that_is_cancelled_ends_its_call(kind, traced):
    """A service whose own caller disconnected passes that on."""
    work = Work()
    async with handled_by(traced, **work.handlers()) as calls:
        ending = asyncio.ensure_future(end(start(calls, kind), kind))
        async with asyncio.timeout(5):
            await work.started.wait()
            # gRPC misses a cancellation in the very turn of the loop in which its request went out;
            # then the call ends when Python collects it. Here callee and caller share a loop.
            await asyncio.sleep(0.05)
            ending.cancel()
            await work.ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await ending


async def test_a_stream_that_ends_early_runs_the_handlers_finally():
    """A generator is closed when its reader disconnects, not at a garbage collection."""
    freed = asyncio.Event()

    async def unary_stream(request, context):
        try:
            while True:
                yield value("x" * 10_000)
        finally:
            freed.set()

    async with handled_by(unary_stream=unary_stream) as calls:
        call = calls.unary_stream(value(""))
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await freed.wait()


async def test_a_deadline_that_has_passed_is_reported_before_any_work():
    """A queue before may have used up the time."""
    work = Work()
    async with handled_by(**work.handlers()) as calls:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.unary_unary(value(""), timeout=0.001)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not work.started.is_set() or work.ended.is_set()


async def test_a_timeout_of_the_handlers_own_is_not_the_callers_deadline():
    """It is a bug, and so an internal error."""

    async def unary_unary(request, context):
        raise TimeoutError

    async with handled_by(unary_unary=unary_unary) as calls:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.unary_unary(value(""), timeout=LONG_SECONDS)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
