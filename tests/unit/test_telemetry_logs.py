"""Log lines, as a process writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SETUP = """
import logging, warnings
import structlog
from opentelemetry import trace
from libs.telemetry.logs import setup_logging
from libs.telemetry.tracing import current_trace_id, setup_tracing

setup_logging(service="test", level="{level}")
setup_tracing(service="test")
log = structlog.get_logger()
"""


def lines_of(script: str, *, level: str = "info") -> list[dict[str, Any]]:
    output = subprocess.run(
        [sys.executable, "-c", SETUP.format(level=level) + script],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_each_line_has_its_service_level_and_time() -> None:
    """A line can be read on its own."""
    (line,) = lines_of("log.info('served', tenant='acme')")
    assert line.pop("time").endswith("Z")
    assert line == {"event": "served", "level": "info", "service": "test", "tenant": "acme"}


def test_a_line_inside_a_span_has_the_trace_id() -> None:
    """The trace id is the one that `current_trace_id` gives to clients."""
    (line,) = lines_of(
        "with trace.get_tracer('t').start_as_current_span('s'):\n"
        "    log.info('served', expected=current_trace_id())"
    )
    assert len(line["trace_id"]) == 32
    assert line["trace_id"] == line["expected"]
    assert len(line["span_id"]) == 16


def test_libraries_log_alike() -> None:
    """Records of the standard library have the same form, with the logger's name."""
    (line,) = lines_of("logging.getLogger('some.library').warning('slow: %s ms', 5)")
    assert line["event"] == "slow: 5 ms"
    assert line["logger"] == "some.library"
    assert line["level"] == "warning"
    assert line["service"] == "test"


def test_warnings_are_lines_too() -> None:
    """Nothing but JSON is written."""
    (line,) = lines_of("warnings.warn('old', UserWarning)")
    assert "old" in line["event"]


def test_bound_context_is_in_every_line() -> None:
    """Bound variables are merged into all lines, those of libraries included."""
    first, second = lines_of(
        "structlog.contextvars.bind_contextvars(request_id='r1')\n"
        "log.info('a')\n"
        "logging.getLogger('x').warning('b')"
    )
    assert (first["request_id"], second["request_id"]) == ("r1", "r1")


def test_a_traceback_contains_no_values() -> None:
    """Local variables and messages of errors contain users' inputs; a traceback shows the code."""
    script = """
def handle(prompt):
    try:
        raise KeyError(prompt)
    except KeyError as error:
        raise RuntimeError(f"failed: {prompt}") from error

for logger in (log, logging.getLogger("x")):
    try:
        handle(prompt="".join(["my ", "secret"]))
    except RuntimeError as error:
        logger.exception("it failed")
        logger.error("it failed", exc_info=error)
"""
    lines = lines_of(script)
    assert len(lines) == 4
    for line in lines:
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert "\nKeyError\nwhich caused:\nTraceback" in line["exception"]
        assert line["exception"].endswith("\nRuntimeError")
        assert "raise KeyError(prompt)" not in line["exception"]  # the script has no file
        assert "my secret" not in json.dumps(line)


def test_values_that_are_errors_are_described() -> None:
    """Also the arguments of libraries' messages."""
    ours, foreign = lines_of(
        "error = ValueError('my secret')\n"
        "log.warning('failed', error=error)\n"
        "logging.getLogger('x').warning('failed: %s', error)"
    )
    assert ours["error"] == "ValueError"
    assert foreign["event"] == "failed: ValueError"


def test_libraries_do_not_log_at_debug() -> None:
    """They would write bodies, messages and SQL."""
    (line,) = lines_of("logging.getLogger('x').debug('no'); log.debug('yes')", level="debug")
    assert line["event"] == "yes"


def test_uncaught_errors_are_lines_without_their_messages() -> None:
    """Of the main thread, of another one, of a finalizer and of the event loop."""
    script = """
import asyncio, threading
from libs.telemetry.logs import log_loop_error

def fail():
    raise ValueError("my secret")

class Finalized:
    def __del__(self):
        fail()

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    loop.call_soon(fail)
    await asyncio.sleep(0)

thread = threading.Thread(target=fail)
thread.start()
thread.join()
Finalized()
asyncio.run(main())
fail()
"""
    ended = subprocess.run(
        [sys.executable, "-c", SETUP.format(level="info") + script],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr == ""
    assert "my secret" not in ended.stdout
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["event"] for line in lines] == [
        "uncaught error in a thread",
        "error that could not be raised",
        "error in the event loop",
        "uncaught error",
    ]
    assert all(line["exception"].endswith("ValueError") for line in lines)


def test_lines_below_the_level_are_not_written() -> None:
    """Of both kinds of loggers."""
    (line,) = lines_of(
        "log.info('no'); logging.getLogger('x').info('no'); log.warning('yes')", level="warning"
    )
    assert line["event"] == "yes"


def test_an_unknown_level_is_refused() -> None:
    """A typo must not silence a service."""
    ended = subprocess.run(
        [sys.executable, "-c", SETUP.format(level="lout")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "ValueError: unknown log level 'lout'" in ended.stderr
