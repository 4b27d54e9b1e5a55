"""When log lines leave: those of one turn of the event loop together, others at once."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from typing_extensions import override

from libs.telemetry.lines import LineWriter

_SETUP = """
import asyncio, atexit, logging, sys, threading
import structlog
from libs.telemetry.logs import setup_logging

setup_logging(service="test", level="info")
log = structlog.get_logger()
"""


class _File(io.BytesIO):
    """Keeps what each write wrote.

    Attributes:
        fails: whether the next write does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.fails = False

    @override
    def write(self, data: Any) -> int:
        if self.fails:
            self.fails = False
            raise BrokenPipeError
        self.writes.append(bytes(data))
        return len(data)


@pytest.fixture
def file() -> _File:
    return _File()


@pytest.fixture
def writer(file: _File) -> LineWriter:
    return LineWriter(file)


def events_of(script: str, *, fails: bool = False) -> list[str]:
    """Returns what a process of its own logged until its end."""
    ended = subprocess.run(
        [sys.executable, "-c", _SETUP + script], check=False, capture_output=True, text=True
    )
    assert (ended.returncode != 0) == fails, ended.stderr
    return [json.loads(line)["event"] for line in ended.stdout.splitlines()]


def test_outside_of_a_loop_a_line_is_written_at_once(file, writer) -> None:
    """There is no later in which it could be."""
    writer.msg(b"a")
    writer.msg(b"b")
    assert file.writes == [b"a\n", b"b\n"]


async def test_the_lines_of_a_turn_leave_in_one_write(file, writer) -> None:
    """In their order, and not later than in the next turn."""
    writer.msg(b"a")
    asyncio.get_running_loop().call_soon(writer.msg, b"c")
    writer.msg(b"b")
    assert file.writes == []
    await asyncio.sleep(0)
    assert file.writes == [b"a\nb\n"]
    await asyncio.sleep(0)
    assert file.writes == [b"a\nb\n", b"c\n"]


async def test_a_line_of_a_thread_is_written_at_once_with_what_waits(file, writer) -> None:
    """The threads of a process have no loop; what was logged before theirs stays before it."""
    writer.msg(b"loop")
    thread = threading.Thread(target=writer.msg, args=(b"thread",))
    thread.start()
    thread.join()
    assert file.writes == [b"loop\nthread\n"]
    writer.msg(b"after")
    await asyncio.sleep(0)
    assert file.writes[1:] == [b"after\n"]


async def test_each_line_is_written_once_whoever_writes_beside_it(file, writer) -> None:
    """Whole, and those of each thread in their order."""
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


async def test_a_write_that_fails_is_told_nowhere_and_hinders_no_later_line(file, writer) -> None:
    """Who logs inside of a loop is not who has to deal with a broken pipe."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: failures.append(told))
    file.fails = True
    writer.msg(b"lost")
    await asyncio.sleep(0)
    assert failures == []  # to tell it would be a line, which would fail
    writer.msg(b"kept")
    await asyncio.sleep(0)
    assert file.writes == [b"kept\n"]


def test_a_line_without_a_turn_after_it_leaves_with_the_next(file, writer) -> None:
    """Of whatever loop."""
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
    "end",
    [
        pytest.param("raise RuntimeError", id="an error"),
        pytest.param("sys.exit(1)", id="an exit"),
        pytest.param(
            "asyncio.get_running_loop().stop(); await asyncio.Event().wait()", id="a stop"
        ),
    ],
)
def test_what_is_logged_in_the_last_turn_is_written(end) -> None:
    """However the process ends, if it is not killed; also what is logged behind it."""
    script = f"""
atexit.register(lambda: log.info("at exit"))

async def main():
    log.info("last")
    {end}

asyncio.run(main())
"""
    assert events_of(script, fails=True) == ["last", "at exit"]


def test_the_lines_of_libraries_keep_their_place() -> None:
    """Who reads a log reads it as what happened after each other."""
    script = """
async def main():
    log.info("first")
    logging.getLogger("library").info("second")
    log.info("third")

asyncio.run(main())
"""
    assert events_of(script) == ["first", "second", "third"]
