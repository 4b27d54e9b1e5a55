"""Structured logs: one JSON object per line, on standard output, with the IDs of its trace."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import orjson
import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from libs.telemetry.lines import LineWriter

# Verbose at `info`, without information for operators.
_QUIET_LIBRARIES = ("asyncio", "aiosqlite", "alembic", "urllib3")


def setup_logging(*, service: str, level: str) -> None:
    """Sends structlog and the standard library's loggers to standard output as JSON lines.

    Each line has `event`, `level`, `time` (UTC), `service`, the bound context variables and, inside
    a span, `trace_id` and `span_id`. Tracebacks are text, without values of variables.

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


def _to_json(event: EventDict, **_default: Any) -> bytes:
    try:
        return orjson.dumps(event, default=repr)
    except TypeError:  # for example, a lone surrogate or an integer of more than 64 bits
        return json.dumps(event, default=repr).encode()


def _processors(service: str) -> list[Processor]:
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
    level = structlog.processors.add_log_level
    stack = structlog.processors.StackInfoRenderer()
    # As text: the dictionaries of structlog contain local variables, and so inputs of users.
    traceback = structlog.processors.format_exc_info

    def complete(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event["service"] = service
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event["trace_id"] = f"{context.trace_id:032x}"
            event["span_id"] = f"{context.span_id:016x}"
        if "exc_info" in event or "stack_info" in event:
            event = traceback(logger, method, stack(logger, method, event))
        return stamp(logger, method, level(logger, method, event))

    return [structlog.contextvars.merge_contextvars, complete]


class _LineHandler(logging.Handler):
    """Writes records of the standard library's loggers as lines of structlog."""

    def __init__(self, lines: LineWriter) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
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
    root.setLevel(threshold)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(capture=True)
