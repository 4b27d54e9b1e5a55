"""Structured logs: one JSON object per line, on standard output, with the IDs of its trace.

No line has contents of requests, at any level: exceptions are written without their messages
(`libs.telemetry.faults`), and libraries log from `info` on only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import orjson
import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from libs.telemetry.faults import describe, traceback_of
from libs.telemetry.lines import LineWriter

# Verbose at `info`, without information for operators.
_QUIET_LIBRARIES = ("asyncio", "aiosqlite", "alembic", "urllib3")

# Logs each header that is not UTF-8 with its value, which may be a token, also without a token.
_GRPC = "grpc._cython.cygrpc"


def setup_logging(*, service: str, level: str) -> None:
    """Sends structlog and the standard library's loggers to standard output as JSON lines.

    Each line has `event`, `level`, `time` (UTC), `service`, the bound context variables and, inside
    a span, `trace_id` and `span_id`. Exceptions, also as values, are described without what they
    quote. Errors that nothing caught become lines, too.

    Raises:
        ValueError: unknown level.
    """
    threshold = logging.getLevelNamesMapping().get(level.upper())
    if threshold is None:
        raise ValueError(f"unknown log level {level!r}; use debug, info, warning or error")
    shared = _processors(service)
    # Unbuffered: a buffer of Python would keep data after errors and write it again.
    stdout = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115  # open for as long as the process lives
    lines = LineWriter(stdout)
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(serializer=_to_json)],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_args: lines,
        cache_logger_on_first_use=True,
    )
    _route_standard_library(shared, threshold, lines)
    _route_uncaught()


def log_loop_error(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Writes what an event loop reports; its default handler would write the objects, too."""
    error = context.get("exception")
    structlog.get_logger().error("error in the event loop", what=context["message"], exc_info=error)


def _to_json(event: EventDict, **_default: Any) -> bytes:
    try:
        return orjson.dumps(event, default=repr)
    except TypeError:  # for example, a lone surrogate or an integer of more than 64 bits
        return json.dumps(event, default=repr).encode()


def _processors(service: str) -> list[Processor]:
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
    level = structlog.processors.add_log_level
    stack = structlog.processors.StackInfoRenderer()

    def complete(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event["service"] = service
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event["trace_id"] = f"{context.trace_id:032x}"
            event["span_id"] = f"{context.span_id:016x}"
        if "exc_info" in event or "stack_info" in event:
            event = _with_traceback(stack(logger, method, event))
        for key, value in event.items():
            if isinstance(value, BaseException):
                event[key] = describe(value)
        return stamp(logger, method, level(logger, method, event))

    return [structlog.contextvars.merge_contextvars, complete]


def _with_traceback(event: EventDict) -> EventDict:
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    if error:
        event["exception"] = traceback_of(error)
    return event


def _quotes_no_header(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")


class _LineHandler(logging.Handler):
    """Writes records of the standard library's loggers as lines of structlog."""

    def __init__(self, lines: LineWriter) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            record.args = tuple(map(_described, record.args))
        try:
            self._lines.msg(self.format(record).encode())
        except Exception:  # noqa: BLE001  # a line that cannot be formatted must not fail its caller
            self.handleError(record)


def _route_standard_library(shared: Sequence[Processor], threshold: int, lines: LineWriter) -> None:
    def add_logger_name(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event["logger"] = event["_record"].name
        return event

    handler = _LineHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                add_logger_name,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Below, libraries write what they process: bodies, messages, SQL with its values.
    root.setLevel(max(threshold, logging.INFO))
    logging.getLogger(_GRPC).addFilter(_quotes_no_header)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(capture=True)


def _described(value: object) -> object:
    return describe(value) if isinstance(value, BaseException) else value


def _route_uncaught() -> None:
    """Writes errors that end a thread or the process as lines, without what they quote."""

    def log_uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        structlog.get_logger().critical("uncaught error", exc_info=error)

    def log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            structlog.get_logger().critical("uncaught error in a thread", exc_info=args.exc_value)

    def log_unraisable(args: Any) -> None:
        structlog.get_logger().error("error that could not be raised", exc_info=args.exc_value)

    sys.excepthook = log_uncaught
    sys.unraisablehook = log_unraisable
    threading.excepthook = log_uncaught_in_thread
