"""Publishes messages; `publish` returns when the message is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import nats.errors
from google.protobuf.message import Message
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from prometheus_client import Histogram

from libs.bus.connection import client_of
from libs.bus.subjects import STREAMS, Stream
from libs.errors import HeadraceError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from libs.telemetry.tracing import child_span

_tracer = trace.get_tracer("headrace.bus")

_PUBLISH_SECONDS = Histogram(
    "headrace_bus_publish_seconds",
    "Time until a message was acknowledged or refused.",
    ["subject", "status"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

DEFAULT_TIMEOUT_SECONDS = 5.0
# After this time without an acknowledgement the message is sent again.
ATTEMPT_TIMEOUT_SECONDS = 2.0
RETRY_PAUSE_SECONDS = 0.05
FULL_RETRY_AFTER_SECONDS = 5.0
UNAVAILABLE_RETRY_AFTER_SECONDS = 1.0

_SERVICE_UNAVAILABLE = 503
_STORE_FAILED = 10077  # among others: "maximum messages exceeded", "maximum bytes exceeded"
_NO_STORAGE_LEFT = (10023, 10047)


class Publisher:
    """Publishes messages to the streams."""

    def __init__(self, js: JetStreamContext, *, streams: Iterable[Stream] = STREAMS) -> None:
        self._js = js
        self._client = client_of(js)
        self._streams = {subject: stream for stream in streams for subject in stream.subjects}

    async def publish(
        self,
        subject: str,
        message: Message,
        *,
        message_id: str,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        context: Context | None = None,
    ) -> int:
        """Returns when JetStream has stored the message; waits during a restart of the server.

        Returns the number of the message in its stream.

        The message may be stored even if this raises. Consumers must recognise messages that they
        have handled by `message_id`, or by an ID in the message.

        Args:
            subject: one of `libs.bus.subjects`.
            message: the event.
            message_id: identifies the event; the stream stores each ID once.
            timeout_seconds: limit for all attempts together.
            context: trace of the message; None: the current one.

        Raises:
            ResourceExhausted: the stream is full.
            Unavailable: no server acknowledged the message in time.
            InvalidArgument: the message is larger than the server accepts.
        """
        started = asyncio.get_running_loop().time()
        status = "OK"
        try:
            with child_span(
                _tracer,
                f"publish {subject}",
                context=context,
                kind=trace.SpanKind.PRODUCER,
                attributes={
                    "messaging.system": "nats",
                    "messaging.operation.type": "send",
                    "messaging.destination.name": subject,
                    "messaging.message.id": message_id,
                },
            ):
                headers = {"Nats-Msg-Id": message_id}
                propagate.inject(headers)
                payload = message.SerializeToString()
                return await self._until_stored(
                    subject, payload, headers, started + timeout_seconds
                )
        except HeadraceError as error:
            status = error.code
            raise
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        finally:
            seconds = asyncio.get_running_loop().time() - started
            _PUBLISH_SECONDS.labels(subject, status).observe(seconds)

    async def _until_stored(
        self, subject: str, payload: bytes, headers: dict[str, str], deadline: float
    ) -> int:
        now = asyncio.get_running_loop().time
        cause: Exception | None = None
        while (remaining := deadline - now()) > 0 and not self._client.is_closed:
            # While disconnected the client would buffer each attempt, so none is made.
            if self._client.is_connected:
                try:
                    timeout = min(remaining, ATTEMPT_TIMEOUT_SECONDS)
                    ack = await self._js.publish(subject, payload, timeout=timeout, headers=headers)
                except APIError as error:
                    cause = error
                    self._raise_unless_temporary(subject, error)
                except nats.errors.MaxPayloadError as error:
                    raise self._too_large(len(payload)) from error
                except (nats.errors.Error, NoStreamResponseError) as error:
                    cause = error
                else:
                    return ack.seq
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
        raise Unavailable(
            "the message bus did not acknowledge in time",
            reason="DEPENDENCY_UNAVAILABLE",
            metadata={"dependency": "nats"},
            retry_after_seconds=UNAVAILABLE_RETRY_AFTER_SECONDS,
        ) from cause

    def _raise_unless_temporary(self, subject: str, error: APIError) -> None:
        description = error.description or ""
        full = error.err_code == _STORE_FAILED and description.startswith("maximum")
        if full or error.err_code in _NO_STORAGE_LEFT:
            stream = self._streams.get(subject)
            queue = stream.name if stream else subject
            raise ResourceExhausted(
                f"{queue} is full: {description}",
                reason="QUEUE_FULL",
                metadata={"queue": queue, "limit": _limit(stream, description)},
                retry_after_seconds=FULL_RETRY_AFTER_SECONDS,
            ) from error
        if error.code != _SERVICE_UNAVAILABLE:
            raise Internal("the message bus refused the message", reason="INTERNAL") from error

    def _too_large(self, size_bytes: int) -> InvalidArgument:
        limit = self._client.max_payload
        text = f"the message has {size_bytes} bytes, more than {limit}"
        return InvalidArgument.too_large("", text, limit_bytes=limit)


def _limit(stream: Stream | None, description: str) -> str:
    if stream is None:
        return description
    if "messages" in description:
        return f"{stream.max_messages} messages"
    return f"{stream.max_bytes} bytes"
