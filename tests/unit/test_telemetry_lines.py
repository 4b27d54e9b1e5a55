"""When log lines are written: those of one turn of the event loop together, others at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading

import pytest

from libs.telemetry.lines import LineWriter

_SETUP = """
import asyncio, atexit, logging, sys, threading
import structlog
from libs.telemetry.logs import setup_logging

setup_logging(service="test", level="info")
log = structlog.get_logger()
"""


class _File:
    """Records each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.writes.append(data)
        return len(data)


@pytest.fixture
def file() -> _File:
    return _File()


@pytest.fixture
def writer(file: _File) -> LineWriter:
    return LineWriter(file)


def events_of(script: str, *, fails: bool = False) -> list[str]:
    """Runs a script in a process and returns the events it logged."""
    ended = subprocess.run(
        [sys.executable, "-c", _SETUP + script], check=False, capture_output=True, text=True
    )
    assert (ended.returncode != 0) == fails, ended.stderr
    return [json.loads(line)["event"] for line in ended.stdout.splitlines()]


def test_outside_of_a_loop_a_line_is_written_at_once(file, writer) -> None:
    """Without an event loop, no later iteration could write it."""
    writer.msg(b"a")
    writer.msg(b"b")
    assert file.writes == [b"a\n", b"b\n"]


async def test_the_lines_of_a_turn_are_written_together(file, writer) -> None:
    """In order, and not later than in the next turn."""
    writer.msg(b"a")
    asyncio.get_running_loop().call_soon(writer.msg, b"c")
    writer.msg(b"b")
    assert file.writes == []
    await asyncio.sleep(0)
    assert file.writes == [b"a\nb\n"]
    await asyncio.sleep(0)
    assert file.writes == [b"a\nb\n", b"c\n"]


async def test_a_line_of_a_thread_is_written_at_once_after_the_waiting_lines(file, writer) -> None:
    """A thread has no loop; lines that were logged before its own stay before it."""
    writer.msg(b"loop")
    thread = threading.Thread(target=writer.msg, args=(b"thread",))
    thread.start()
    thread.join()
    assert file.writes == [b"loop\nthread\n"]
    writer.msg(b"after")
    await asyncio.sleep(0)
    assert file.writes[1:] == [b"after\n"]


async def test_each_line_is_written_once_while_other_threads_write(file, writer) -> None:
    """And no line is cut."""
    count = 2000

    def work(name: str) -> None:
        for number in range(count):
            writer.msg(b"%b %d" % (name.encode(), number))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [asyncio.create_task(asyncio.to_thread(work, name)) for name in "ab"]
        for number in range(count):
            writer.msg(b"loop %d" % number)
            await asyncio.sleep(0)
        await asyncio.gather(*threads)
        await asyncio.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    lines = b"".join(file.writes).decode().splitlines()
    expected = [f"{name} {number}" for name in ("a", "b", "loop") for number in range(count)]
    assert sorted(lines) == sorted(expected)


def test_a_line_of_a_loop_that_stopped_is_written_by_the_next_loop(file, writer) -> None:
    """A loop that stops has no turn left to write it."""
    loop = asyncio.new_event_loop()

    def end() -> None:
        writer.msg(b"last")
        loop.stop()

    async def log() -> None:
        writer.msg(b"first")
        await asyncio.sleep(0)

    loop.call_soon(end)
    loop.run_forever()
    loop.close()
    asyncio.run(log())
    assert b"".join(file.writes) == b"last\nfirst\n"


@pytest.mark.parametrize(
    ("end", "logged"),
    [
        pytest.param("raise RuntimeError", ["uncaught error"], id="an error"),
        pytest.param("sys.exit(1)", [], id="an exit"),
        pytest.param(
            "asyncio.get_running_loop().stop(); await asyncio.Event().wait()",
            ["uncaught error"],
            id="a stop",
        ),
    ],
)
def test_lines_of_the_last_turn_are_written(end, logged) -> None:
    """However the process ends, unless it is killed; also lines that exit handlers log."""
    script = f"""
atexit.register(lambda: log.info("at exit"))

async def main():
    log.info("last")
    {end}

asyncio.run(main())
"""
    assert events_of(script, fails=True) == ["last", *logged, "at exit"]


def test_the_lines_of_libraries_stay_in_order() -> None:
    """The order of lines is the order of events."""
    script = """
async def main():
    log.info("first")
    logging.getLogger("library").info("second")
    log.info("third")

asyncio.run(main())
"""
    assert events_of(script) == ["first", "second", "third"]
