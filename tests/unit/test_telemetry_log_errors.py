"""Log files that refuse lines: counted, retried with pauses, and never a failure of the caller."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from libs.telemetry import lines as lines_module
from libs.telemetry.lines import FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS, LineWriter

REFUSALS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ValueError("I/O operation on closed file"),
    None,  # what an unbuffered file returns instead of raising BlockingIOError
]


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic_seconds(self) -> float:
        return self.seconds


class RefusingFile:
    """Refuses writes while `refusal` is set; else takes at most `take_bytes` of each.

    Attributes:
        tries: calls of `write`.
        content: the bytes that were taken.
    """

    def __init__(self) -> None:
        self.refuses = True
        self.refusal: Exception | None = REFUSALS[0]
        self.take_bytes = 1_000_000_000
        self.tries = 0
        self.content = b""

    def write(self, data: bytes) -> int | None:
        self.tries += 1
        if self.refuses:
            if self.refusal is not None:
                raise self.refusal
            return None
        taken = data[: self.take_bytes]
        self.content += taken
        return len(taken)


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


@pytest.fixture
def file() -> RefusingFile:
    return RefusingFile()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def writer(file, clock) -> LineWriter:
    return LineWriter(file, clock)


@pytest.mark.parametrize("refusal", REFUSALS, ids=repr)
async def test_a_refused_write_reaches_neither_caller_nor_event_loop(refusal, file, writer):
    """The loop's handler would log the error: one more line that cannot be written."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    file.refusal = refusal
    errors = counted("headrace_log_write_errors_total")
    writer.msg(b"line")
    await asyncio.sleep(0.01)
    assert failures == []
    assert file.tries == 1
    assert counted("headrace_log_write_errors_total") == errors + 1


async def test_lines_that_were_refused_are_written_when_the_file_takes_them(file):
    """By a timer, since no other line may follow; in order."""
    writer = LineWriter(file)
    writer.msg(b"a")
    await asyncio.sleep(0)
    writer.msg(b"b")
    await asyncio.sleep(0)
    file.refuses = False
    assert file.content == b""
    await asyncio.sleep(1.5 * FIRST_RETRY_SECONDS)
    assert file.content == b"a\nb\n"
    writer.msg(b"c")
    await asyncio.sleep(0)
    assert file.content == b"a\nb\nc\n"


def test_the_pauses_between_tries_grow_to_a_limit(file, clock, writer):
    """However many lines come in between."""
    seconds = []
    for _ in range(10):
        writer.msg(b"line")
        tries, since = file.tries, clock.seconds
        while file.tries == tries:
            clock.seconds += 0.05
            writer.msg(b"line")
        seconds.append(clock.seconds - since)
    assert seconds[0] == pytest.approx(FIRST_RETRY_SECONDS, abs=0.06)
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(MAX_RETRY_SECONDS, abs=0.06)


def test_a_thread_that_writes_the_waiting_lines_ends_the_pause_of_the_loop(file, clock):
    """Lines logged afterwards do not wait for the timer of the next try."""
    writer = LineWriter(file, clock)

    async def log() -> None:
        writer.msg(b"a")
        await asyncio.sleep(0)
        file.refuses = False
        clock.seconds += FIRST_RETRY_SECONDS
        await asyncio.to_thread(writer.msg, b"b")
        assert file.content == b"a\nb\n"
        writer.msg(b"c")
        await asyncio.sleep(0)
        assert file.content == b"a\nb\nc\n"

    asyncio.run(log())


def test_the_oldest_lines_are_dropped_and_counted(file, clock, writer, monkeypatch):
    """Memory is limited; what happened last says most."""
    monkeypatch.setattr(lines_module, "MAX_WAITING_BYTES", 10)
    lost = counted("headrace_log_lines_lost_total")
    for number in range(25):
        writer.msg(b"%02d" % number)
    assert counted("headrace_log_lines_lost_total") == lost + 20
    file.refuses = False
    clock.seconds += MAX_RETRY_SECONDS
    writer.msg(b"25")
    assert file.content == b"21\n22\n23\n24\n25\n"


@pytest.mark.parametrize("take_bytes", range(1, 8))
def test_a_line_that_was_written_in_part_is_completed(take_bytes, file, clock, writer, monkeypatch):
    """Even when it is the oldest and lines must be dropped: no line is cut or joined to another."""
    monkeypatch.setattr(lines_module, "MAX_WAITING_BYTES", 9)
    file.refuses, file.take_bytes = False, take_bytes
    write: Callable[[bytes], int | None] = file.write

    def once(data: bytes) -> int | None:
        file.refuses = bool(file.content)
        return write(data)

    monkeypatch.setattr(file, "write", once)
    writer.msg(b"first")
    for _ in range(5):
        writer.msg(b"other")
    monkeypatch.setattr(file, "write", write)
    file.refuses = False
    clock.seconds += MAX_RETRY_SECONDS
    writer.msg(b"last")
    lines = file.content.split(b"\n")
    assert lines[0] == b"first"
    assert lines[-2:] == [b"last", b""]
    assert set(lines[1:-2]) <= {b"other"}


def test_lines_that_cannot_be_written_at_the_end_are_counted(file, writer):
    """The process ends all the same."""
    lost = counted("headrace_log_lines_lost_total")
    writer.msg(b"a")
    writer.msg(b"b")
    writer.close()
    assert counted("headrace_log_lines_lost_total") == lost + 2


SCRIPT = """
import asyncio, logging, time
import structlog
from libs.telemetry.logs import setup_logging

setup_logging(service="test", level="info")

async def main():
    for number in range(20):
        structlog.get_logger().info("line", number=number)
        logging.getLogger("library").warning("line")
        await asyncio.sleep(0.01)

started = time.process_time()
asyncio.run(main(), debug=False)
assert time.process_time() - started < 0.15, "it spins"
"""


def test_a_process_whose_output_is_on_a_full_disk_works_and_ends_well() -> None:
    """It neither spins nor exits with an error, and writes nothing elsewhere."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_process_whose_reader_is_slow_does_not_block_on_a_non_blocking_pipe() -> None:
    """The pipe is full from the start."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(65536))
    except BlockingIOError:
        pass
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    os.close(reader)
    assert (ended.returncode, ended.stderr) == (0, b"")
