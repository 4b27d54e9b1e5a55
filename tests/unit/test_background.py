"""Background tasks: an error is logged and counted at once, and ends a process that needs them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from libs.background import start_task
from libs.bus import worker as worker_module
from libs.bus.subjects import USAGE, Consumer
from libs.bus.worker import PullWorker
from libs.errors import Internal
from libs.metering.batches import UsageBatches

CONSUMER = Consumer(name="test", stream=USAGE, max_attempts=None, ack_wait_seconds=0.03)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def fail() -> None:
    raise RuntimeError("broken")


async def test_an_error_is_logged_and_counted_at_once():
    """Not when the task is collected, as asyncio does."""
    failures = counted("headrace_background_task_failures_total", task="test")
    with capture_logs() as logs:
        task = start_task(fail(), name="test")
        await asyncio.wait([task])
        await asyncio.sleep(0)
    assert [(line["event"], line["task"]) for line in logs] == [("background task failed", "test")]
    assert counted("headrace_background_task_failures_total", task="test") == failures + 1


async def test_the_end_of_a_task_is_no_failure():
    """Whether it returned or its owner cancelled it."""
    with capture_logs() as logs:
        returned = start_task(asyncio.sleep(0), name="test")
        cancelled = start_task(asyncio.sleep(60), name="test")
        cancelled.cancel()
        await asyncio.wait([returned, cancelled])
        await asyncio.sleep(0)
    assert logs == []


class Delivered:
    """A message in a handler.

    Attributes:
        heartbeats: that were sent for it.
    """

    subject = "headrace.inference.usage.recorded"
    headers = None
    data = b""
    metadata = SimpleNamespace(num_delivered=1, num_pending=0)

    def __init__(self, error: BaseException | None = None) -> None:
        self.heartbeats = 0
        self._error = error

    async def in_progress(self) -> None:
        self.heartbeats += 1
        if self._error is not None:
            raise self._error

    async def ack(self) -> None:
        return

    async def nak(self, delay: float | None = None) -> None:
        return


class Pulling:
    """Takes the place of a pull consumer: delivers these messages, then waits."""

    def __init__(self, messages: list[Delivered]) -> None:
        self._messages = messages

    def __call__(self, _js: Any, _consumer: Any, *, room: Any, take: Any) -> Pulling:
        self._take = take
        return self

    async def run(self) -> None:
        for message in self._messages:
            self._take(message)
        await asyncio.Event().wait()

    def wake(self) -> None:
        return


def worker_of(messages: list[Delivered], monkeypatch: pytest.MonkeyPatch) -> PullWorker[Any]:
    monkeypatch.setattr(worker_module, "Pull", Pulling(messages))
    client = SimpleNamespace(is_connected=True)
    return PullWorker(cast(JetStreamContext, SimpleNamespace(_nc=client)), CONSUMER, concurrency=9)


async def until_cancelled(_delivery: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError("no network")], ids=repr)
async def test_heartbeats_go_on_after_any_error(error, monkeypatch):
    """Of this message and of the others; each failure is counted."""
    messages = [Delivered(error), Delivered()]
    failures = counted("headrace_bus_heartbeat_failures_total", consumer="test")
    worker = worker_of(messages, monkeypatch)
    running = asyncio.create_task(worker.run(until_cancelled))
    async with asyncio.timeout(10):
        while min(message.heartbeats for message in messages) < 3:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
    assert not running.done()
    assert counted("headrace_bus_heartbeat_failures_total", consumer="test") >= failures + 3
    await worker.drain(0)
    await running


async def test_a_worker_without_heartbeats_ends_with_an_error(monkeypatch):
    """Its process ends and is started again: else its messages would be delivered twice."""
    worker = worker_of([Delivered(asyncio.CancelledError())], monkeypatch)
    with pytest.raises(RuntimeError, match="heartbeats of test ended"):
        await asyncio.wait_for(worker.run(until_cancelled), 10)


async def test_callers_get_an_error_where_the_task_that_publishes_was_cancelled():
    """None of them waits for ever, and the next record is published by a new task."""

    class Publishes:
        cancels = True

        async def publish(self, *_args: Any, **_options: Any) -> None:
            if self.cancels:
                self.cancels = False
                raise asyncio.CancelledError

    batches = UsageBatches(cast(Any, Publishes()), timeout_seconds=5)
    waiting = [batches.publish(events_pb2.UsageRecorded(usage_id=str(each))) for each in range(3)]
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        await batches.publish(events_pb2.UsageRecorded(usage_id="next"))
    assert [type(error) for error in ended] == [Internal] * 3


PROCESS = """
import asyncio
from pathlib import Path
from libs.config import ServiceSettings
from libs.process import process, run

class Settings(ServiceSettings):
    pass

async def work():
    await asyncio.sleep(0.05)
    {end}

async def main():
    settings = Settings(home=Path("."), listen_address="127.0.0.1:0",
        metrics_address="127.0.0.1:0", input_hash_key_file=Path("key"), drain_seconds=0,
        log_level="info", otlp_endpoint=None, plaintext=True)
    async with process("test", settings) as running:
        running.spawn(work())
        await running.serve()

run(main())
"""


@pytest.mark.parametrize(
    ("end", "event"),
    [
        ("raise RuntimeError", "background task failed"),
        ("raise asyncio.CancelledError", "background task was cancelled"),
    ],
)
def test_a_process_ends_when_its_background_work_does(end, event):
    """A watch that stopped would leave a process that answers from old snapshots for ever."""
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS.format(end=end)],
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["serving", event, "draining"]
    assert lines[1]["task"] == "work"
