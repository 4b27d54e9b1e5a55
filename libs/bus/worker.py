"""Runs handlers on messages, at least once for each, until it succeeds or is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, cast

import nats.errors
import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from prometheus_client import Counter, Gauge, Histogram

from libs.background import start_task
from libs.bus.connection import client_of
from libs.bus.delivery import Delivery, Handler, M, PoisonMessage
from libs.bus.erasure import erase
from libs.bus.pull import Pull
from libs.bus.subjects import MESSAGE_TYPES, Consumer
from libs.errors import HeadraceError
from libs.telemetry.faults import error_type
from libs.telemetry.genai import ERROR_TYPE
from libs.telemetry.tracing import child_span

__all__ = ["Delivery", "Handler", "PoisonMessage", "PullWorker"]

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.bus")

_DELIVERIES = Counter(
    "headrace_bus_deliveries",
    "Deliveries by outcome: done, retried, exhausted, poison or interrupted.",
    ["consumer", "outcome"],
)
_HANDLE_SECONDS = Histogram(
    "headrace_bus_handle_seconds",
    "Duration of a handler.",
    ["consumer"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_IN_FLIGHT = Gauge(
    "headrace_bus_messages_in_flight", "Messages that handlers are running on.", ["consumer"]
)
_PENDING = Gauge(
    "headrace_bus_messages_pending",
    "Messages not delivered yet, as of the last delivery.",
    ["consumer"],
)

_HEARTBEAT_FAILURES = Counter(
    "headrace_bus_heartbeat_failures", "Heartbeats that could not be sent.", ["consumer"]
)

# Heartbeats of a message within `ack_wait`; without them the server delivers it again.
HEARTBEATS_PER_ACK_WAIT = 3
DEFAULT_DRAIN_SECONDS = 5.0


class PullWorker(Generic[M]):
    """Runs a handler on each message of a durable consumer.

    A message is acknowledged when its handler returns. If the handler raises, the message is
    delivered again after the consumer's delay (or the error's `retry_after_seconds`, if longer).
    After `max_attempts`, also if its workers died, the message is passed to `on_exhausted` and
    removed when that returns. `PoisonMessage` removes it immediately. What is removed is
    overwritten on the disk if it has contents (`Stream.content_subjects`).

    A handler may get a message again that it has already handled, and must detect that.
    """

    def __init__(
        self,
        js: JetStreamContext,
        consumer: Consumer,
        *,
        concurrency: int,
        on_exhausted: Handler[M] | None = None,
        message_types: Mapping[str, type[Message]] = MESSAGE_TYPES,
    ) -> None:
        """Makes a worker; `run` starts it.

        Args:
            js: JetStream.
            consumer: source of the messages; created if it is missing.
            concurrency: most handlers that run at the same time.
            on_exhausted: called with messages that are given up; required with `max_attempts`.
            message_types: types of the messages by subject.

        Raises:
            ValueError: the consumer has `max_attempts`, and `on_exhausted` is missing.
        """
        if consumer.max_attempts is not None and on_exhausted is None:
            raise ValueError(f"{consumer.name} has max_attempts and needs on_exhausted")
        self._js = js
        self._consumer = consumer
        # Looked up once, because a lookup costs as much as the update of the metric.
        self._in_flight_gauge = _IN_FLIGHT.labels(consumer.name)
        self._pending_gauge = _PENDING.labels(consumer.name)
        self._handle_seconds = _HANDLE_SECONDS.labels(consumer.name)
        self._client = client_of(js)
        self._concurrency = concurrency
        self._on_exhausted = on_exhausted
        self._message_types = message_types
        self._pull = Pull(js, consumer, room=self._room, take=self._take)
        self._handler: Handler[M]
        self._in_flight: dict[asyncio.Task[None], Msg] = {}
        self._draining = False
        self._drain_seconds = 0.0
        self._pulling: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    async def run(self, handler: Handler[M]) -> None:
        """Runs handlers until `drain`; survives restarts of the server.

        If cancelled, it cancels the handlers and returns their messages to the queue.

        Raises:
            nats.errors.ConnectionClosedError: the client was closed for good.
        """
        if self._draining:
            return
        self._handler = handler
        self._pulling = start_task(self._pull.run(), name=f"pull {self._consumer.name}")
        heartbeats = start_task(self._send_heartbeats(), name=f"heartbeats {self._consumer.name}")
        try:
            await asyncio.wait([self._pulling, heartbeats], return_when=asyncio.FIRST_COMPLETED)
            if heartbeats.done():
                raise RuntimeError(f"the heartbeats of {self._consumer.name} ended")
            if not self._draining:
                self._pulling.result()
        finally:
            self._draining = True
            self._pulling.cancel()
            await asyncio.wait([self._pulling])
            await self._finish()
            heartbeats.cancel()
            self._ended.set()

    async def drain(self, timeout_seconds: float = DEFAULT_DRAIN_SECONDS) -> None:
        """Stops pulling, waits for handlers up to the timeout, then cancels them; `run` returns."""
        self._draining = True
        self._drain_seconds = timeout_seconds
        if self._pulling is not None:
            self._pulling.cancel()
            await self._ended.wait()

    async def _finish(self) -> None:
        if self._in_flight:
            await asyncio.wait(list(self._in_flight), timeout=self._drain_seconds)
        for task in self._in_flight:
            task.cancel()
        if self._in_flight:
            await asyncio.wait(list(self._in_flight))

    def _room(self) -> int:
        return self._concurrency - len(self._in_flight)

    def _take(self, message: Msg) -> None:
        task = start_task(
            self._give_back(message) if self._draining else self._work(message),
            name=f"delivery {self._consumer.name}",
        )
        self._in_flight[task] = message
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self._in_flight[task]
        self._in_flight_gauge.set(len(self._in_flight))
        self._pull.wake()

    async def _send_heartbeats(self) -> None:
        """Prevents messages of running handlers from being delivered to another worker."""
        while True:
            await asyncio.sleep(self._consumer.ack_wait_seconds / HEARTBEATS_PER_ACK_WAIT)
            errors = [
                error
                for message in list(self._in_flight.values())
                if self._client.is_connected
                and (error := await _heartbeat_error(message)) is not None
            ]
            if errors:
                _HEARTBEAT_FAILURES.labels(self._consumer.name).inc(len(errors))
                name, failures = self._consumer.name, len(errors)
                _log.warning(
                    "heartbeats failed", consumer=name, failures=failures, exc_info=errors[0]
                )

    async def _work(self, message: Msg) -> None:
        name, attempt = self._consumer.name, message.metadata.num_delivered
        headers = message.headers or {}
        message_id = headers.get("Nats-Msg-Id", "")
        self._in_flight_gauge.set(len(self._in_flight))
        self._pending_gauge.set(message.metadata.num_pending)
        attributes: dict[str, str | int] = {
            "messaging.system": "nats",
            "messaging.operation.type": "process",
            "messaging.destination.name": message.subject,
            "messaging.consumer.group.name": name,
            "messaging.message.id": message_id,
            "headrace.attempt": attempt,
        }
        with (
            child_span(
                _tracer,
                f"process {message.subject}",
                # Continues the trace of the publisher, not that of the task's parent.
                context=propagate.extract(headers, Context()),
                kind=trace.SpanKind.CONSUMER,
                attributes=attributes,
            ) as span,
            structlog.contextvars.bound_contextvars(message_id=message_id, attempt=attempt),
        ):
            outcome = await self._settle(message)
            span.set_attribute("headrace.outcome", outcome)
        _DELIVERIES.labels(name, outcome).inc()

    async def _settle(self, message: Msg) -> str:
        """Handles the message, reports the result to the server, and returns the outcome."""
        try:
            delivery = self._parse(message)
        except PoisonMessage as poison:
            return await self._discard(message, poison)
        try:
            if self._exhausted(
                delivery.attempt - 1
            ):  # all its workers died, including the last one
                return await self._give_up(delivery)
            with self._handle_seconds.time():
                await self._handler(delivery)
        except asyncio.CancelledError:
            await self._give_back(message)
            _DELIVERIES.labels(self._consumer.name, "interrupted").inc()
            raise
        except PoisonMessage as poison:
            return await self._discard(message, poison)
        except Exception as error:  # noqa: BLE001  # whatever fails is tried again
            _mark_failed(error)
            if self._exhausted(delivery.attempt):
                return await self._give_up(replace(delivery, error=error))
            return await self._retry(delivery, error)
        await self._erase(message)
        await message.ack()
        return "done"

    def _parse(self, message: Msg) -> Delivery[M]:
        message_type = self._message_types.get(message.subject)
        if message_type is None:
            raise PoisonMessage(f"unknown message type of the subject {message.subject}")
        try:
            parsed = message_type.FromString(message.data)
        except DecodeError as error:
            raise PoisonMessage(f"not a {message_type.__name__}") from error
        headers = message.headers or {}
        return Delivery(
            message=cast("M", parsed),
            subject=message.subject,
            attempt=message.metadata.num_delivered,
            message_id=headers.get("Nats-Msg-Id", ""),
            headers=headers,
            _raw=message,
        )

    def _exhausted(self, attempts: int) -> bool:
        limit = self._consumer.max_attempts
        return limit is not None and attempts >= limit

    async def _give_up(self, delivery: Delivery[M]) -> str:
        assert self._on_exhausted is not None  # noqa: S101  # the constructor saw to it
        try:
            await self._on_exhausted(delivery)
        except Exception as error:  # noqa: BLE001  # it stays on the queue until a worker takes it
            return await self._retry(delivery, error)
        _log.error("message given up", subject=delivery.subject, error=delivery.error)
        raw = delivery._raw  # noqa: SLF001  # the two are one
        await self._erase(raw)
        await raw.term()
        return "exhausted"

    async def _retry(self, delivery: Delivery[M], error: Exception) -> str:
        delays = self._consumer.retry_delays_seconds
        delay = delays[min(delivery.attempt, len(delays)) - 1]
        if isinstance(error, HeadraceError):
            delay = max(delay, error.retry_after_seconds or 0.0)
        _log.warning(
            "delivery failed",
            subject=delivery.subject,
            retry_seconds=delay,
            exc_info=None if isinstance(error, HeadraceError) else error,
            error=error,
        )
        await delivery._raw.nak(delay=delay)  # noqa: SLF001  # the two are one
        return "retried"

    async def _discard(self, message: Msg, poison: PoisonMessage) -> str:
        _mark_failed(poison)
        _log.error("poison message", subject=message.subject, error=poison)
        await self._erase(message)
        await message.term()
        return "poison"

    async def _erase(self, message: Msg) -> None:
        """Overwrites the message if it has contents; the caller acknowledges it."""
        stream = self._consumer.stream
        if message.subject in stream.content_subjects:
            await erase(self._js, stream, message.metadata.sequence.stream)

    async def _give_back(self, message: Msg) -> None:
        """Returns the message to the queue for another worker."""
        try:
            await message.nak()
        except nats.errors.Error as error:
            _log.debug("message not returned to the queue", error=error)


def _mark_failed(error: Exception) -> None:
    span = trace.get_current_span()
    span.set_attribute(ERROR_TYPE, error_type(error))
    span.set_status(trace.StatusCode.ERROR)


async def _heartbeat_error(message: Msg) -> Exception | None:
    """Sends a heartbeat for a message; returns the error, if any."""
    try:
        await message.in_progress()
    except Exception as error:  # noqa: BLE001  # whatever it is, the next one may succeed
        return error
    return None
