"""Erases messages: their bytes are overwritten in the files of their stream.

An acknowledged message is removed from a work queue, but its bytes stay in the file until all
messages in that file are removed, or the server compacts it.
"""

from __future__ import annotations

from collections.abc import Mapping

import nats.errors
import structlog
from nats.js import JetStreamContext
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError, ServerError
from prometheus_client import Counter

from libs.bus.subjects import Stream

_log = structlog.get_logger()

_FAILURES = Counter(
    "headrace_bus_erasure_failures",
    "Messages that were removed from a stream or wait there, but could not be overwritten.",
    ["stream"],
)

_MESSAGE_ID = "Nats-Msg-Id"
# What the server answers for a message that was removed before.
_NO_MESSAGE = (10037, 10043, 10057)


async def erase(js: JetStreamContext, stream: Stream, sequence: int) -> bool:
    """Removes a message from a stream and overwrites it; returns whether it is gone.

    A message that is delivered and not acknowledged can be erased, too: it is not delivered again.
    A failure is logged and counted, not raised.
    """
    try:
        await js.delete_msg(stream.name, sequence)
    except NotFoundError:
        return True
    except (TimeoutError, nats.errors.Error, JetStreamError) as error:
        if isinstance(error, ServerError) and error.err_code in _NO_MESSAGE:
            return True
        _failed(stream, sequence, error)
        return False
    return True


async def erase_if_present(
    js: JetStreamContext, stream: Stream, message_ids: Mapping[int, str]
) -> bool:
    """Erases messages that are still in the stream; returns whether all are gone.

    A failure is logged and counted, not raised.

    Args:
        js: JetStream.
        stream: the stream.
        message_ids: by the number that the stream acknowledged, what the message's id starts with.
            A stream that lost messages gives their numbers to others, which stay.
    """
    all_gone = True
    try:
        state = (await js.stream_info(stream.name)).state
        for sequence, message_id in message_ids.items():
            if state.first_seq <= sequence <= state.last_seq and await _is(
                js, stream, sequence, message_id
            ):
                all_gone &= await erase(js, stream, sequence)
    except (TimeoutError, nats.errors.Error, JetStreamError) as error:
        _failed(stream, None, error)
        return False
    return all_gone


async def _is(js: JetStreamContext, stream: Stream, sequence: int, message_id: str) -> bool:
    try:
        message = await js.get_msg(stream.name, sequence)
    except NotFoundError:
        return False
    return str((message.headers or {}).get(_MESSAGE_ID, "")).startswith(message_id)


def _failed(stream: Stream, sequence: int | None, error: Exception) -> None:
    _FAILURES.labels(stream.name).inc()
    _log.warning("message not erased", stream=stream.name, sequence=sequence, error=error)
