"""Working on messages of a real NATS server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import MESSAGE_TYPES, Consumer, Stream
from libs.bus.worker import Delivery, PoisonMessage, PullWorker
from libs.errors import Unavailable
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.integration

SUBJECT = "test.work"
STREAM = Stream(name="WORK", subjects=(SUBJECT,), max_messages=10_000, max_bytes=10_000_000)
CONSUMER = Consumer(
    name="worker",
    stream=STREAM,
    max_attempts=3,
    ack_wait_seconds=1.0,
    retry_delays_seconds=(0.05, 0.1),
)
TYPES = {**MESSAGE_TYPES, SUBJECT: events_pb2.JobSubmitted}
WAIT_SECONDS = 20.0

Job: TypeAlias = events_pb2.JobSubmitted


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with running_nats(tmp_path) as running:
        yield running


@pytest.fixture
async def js(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    client = await connect(server.url, name="test")
    context = client.jetstream()
    await ensure_streams(context, streams=[STREAM])
    yield context
    await client.drain()


class Bench:
    """A worker that notes what it is given, and what it gave up."""

    def __init__(
        self, js: JetStreamContext, *, consumer: Consumer = CONSUMER, concurrency: int = 4
    ):
        self.given: list[tuple[str, int]] = []
        self.exhausted: list[Delivery[Job]] = []
        self.act: Callable[[Delivery[Job]], object] | None = None
        self.worker: PullWorker[Job] = PullWorker(
            js,
            consumer,
            concurrency=concurrency,
            on_exhausted=self._exhausted,
            message_types=TYPES,
        )
        self._changed = asyncio.Condition()
        self._running = asyncio.create_task(self.worker.run(self._handle))

    async def _handle(self, delivery: Delivery[Job]) -> None:
        async with self._changed:
            self.given.append((delivery.message.job_id, delivery.attempt))
            self._changed.notify_all()
        if self.act is not None:
            result = self.act(delivery)
            if asyncio.iscoroutine(result):
                await result

    async def _exhausted(self, delivery: Delivery[Job]) -> None:
        async with self._changed:
            self.exhausted.append(delivery)
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(condition)

    async def end(self, timeout_seconds: float = 5.0) -> None:
        await self.worker.drain(timeout_seconds)
        await self._running

    async def crash(self) -> None:
        """Ends as abruptly as a task can."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


async def submit(js: JetStreamContext, *job_ids: str) -> None:
    publisher = Publisher(js, streams=[STREAM])
    for job_id in job_ids:
        await publisher.publish(SUBJECT, Job(job_id=job_id), message_id=job_id, timeout_seconds=15)


async def left(js: JetStreamContext) -> int:
    """Returns the number of unfinished messages, after the server has processed the acks."""
    await js._nc.flush()
    await asyncio.sleep(0.05)
    return (await js.stream_info(STREAM.name)).state.messages


def fail(_delivery: Delivery[Job]) -> None:
    raise RuntimeError("the first try fails")


async def test_what_was_done_leaves_the_queue(js: JetStreamContext) -> None:
    """Each message is handled once where nothing goes wrong."""
    bench = Bench(js)
    jobs = [f"job-{number}" for number in range(100)]
    await submit(js, *jobs)
    await bench.until(lambda: len(bench.given) == 100)
    await bench.end()
    assert sorted(bench.given) == sorted((job, 1) for job in jobs)
    assert await left(js) == 0


async def test_a_message_that_comes_to_an_idle_worker_is_handled_at_once(
    js: JetStreamContext,
) -> None:
    """Nothing is held back until a batch is full."""
    bench = Bench(js, concurrency=8)
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0.3)
    for number in range(5):
        started = loop.time()
        await submit(js, f"job-{number}")
        await bench.until(lambda number=number: len(bench.given) == number + 1)  # type: ignore[misc]
        assert loop.time() - started < 3.0  # a pull that is held back takes 30 seconds
    await bench.end()


async def test_a_handler_that_fails_is_tried_again(js: JetStreamContext) -> None:
    """It sees the same message with a higher attempt."""
    bench = Bench(js)
    bench.act = lambda delivery: fail(delivery) if delivery.attempt == 1 else None
    await submit(js, "a")
    await bench.until(lambda: len(bench.given) == 2)
    await bench.end()
    assert bench.given == [("a", 1), ("a", 2)]
    assert await left(js) == 0


async def test_a_handler_may_say_when_to_try_again(js: JetStreamContext) -> None:
    """An error's `retry_after_seconds` is kept where it is longer than the consumer's delay."""
    loop = asyncio.get_running_loop()
    times: list[float] = []

    def busy(delivery: Delivery[Job]) -> None:
        times.append(loop.time())
        if delivery.attempt == 1:
            raise Unavailable("later", reason="MODEL_NOT_READY", retry_after_seconds=0.8)

    bench = Bench(js)
    bench.act = busy
    await submit(js, "a")
    await bench.until(lambda: len(bench.given) == 2)
    await bench.end()
    assert times[1] - times[0] > 0.7


async def test_a_message_that_always_fails_is_given_up_and_handed_over(
    js: JetStreamContext,
) -> None:
    """After the last attempt the error is reported, and other messages are not delayed."""
    bench = Bench(js, concurrency=1)
    bench.act = lambda delivery: fail(delivery) if delivery.message.job_id == "bad" else None
    await submit(js, "bad", "good-1", "good-2")
    await bench.until(lambda: bool(bench.exhausted) and len(bench.given) == 5)
    await bench.end()
    (given_up,) = bench.exhausted
    assert (given_up.message.job_id, given_up.attempt) == ("bad", 3)
    assert isinstance(given_up.error, RuntimeError)
    assert Counter(job for job, _ in bench.given) == {"bad": 3, "good-1": 1, "good-2": 1}
    assert await left(js) == 0


async def test_a_message_that_kills_its_worker_each_time_is_given_up(js: JetStreamContext) -> None:
    """No handler runs on it any more: whoever takes it over must outlive it."""
    consumer = replace(CONSUMER, max_attempts=2)
    started = asyncio.Event()

    async def hang(_delivery: Delivery[Job]) -> None:
        started.set()
        await asyncio.sleep(WAIT_SECONDS)

    await submit(js, "deadly")
    for _ in range(2):
        bench = Bench(js, consumer=consumer)
        bench.act = hang
        await started.wait()
        started.clear()
        await bench.crash()
    bench = Bench(js, consumer=consumer)
    await bench.until(lambda: bool(bench.exhausted))
    await bench.end()
    assert bench.given == []
    assert bench.exhausted[0].error is None
    assert await left(js) == 0


async def test_a_message_stays_until_somebody_has_taken_it_over(js: JetStreamContext) -> None:
    """What is given up is not lost when `on_exhausted` fails, too."""
    calls: list[int] = []
    taken = asyncio.Event()

    async def handle(_delivery: Delivery[Job]) -> None:
        raise RuntimeError("never works")

    async def take_over(delivery: Delivery[Job]) -> None:
        calls.append(delivery.attempt)
        if len(calls) == 1:
            raise RuntimeError("the database is away")
        taken.set()

    worker: PullWorker[Job] = PullWorker(
        js, CONSUMER, concurrency=1, on_exhausted=take_over, message_types=TYPES
    )
    running = asyncio.create_task(worker.run(handle))
    await submit(js, "a")
    async with asyncio.timeout(WAIT_SECONDS):
        await taken.wait()
    await worker.drain()
    await running
    assert calls == [3, 4]
    assert await left(js) == 0


async def test_poison_is_taken_off_at_once(js: JetStreamContext) -> None:
    """What cannot be read, or what a handler refuses for ever, is not tried again."""

    def refuse(delivery: Delivery[Job]) -> None:
        if delivery.message.job_id == "refused":
            raise PoisonMessage("no such kind of job")

    bench = Bench(js)
    bench.act = refuse
    await js.publish(SUBJECT, b"\xff\xff\xff not a proto")
    await submit(js, "refused", "good")
    await bench.until(lambda: len(bench.given) == 2)
    await bench.end()
    assert {job for job, _ in bench.given} == {"refused", "good"}
    assert bench.exhausted == []
    assert await left(js) == 0


async def test_no_more_handlers_run_than_allowed(js: JetStreamContext) -> None:
    """The limit holds with a full queue, and all of it is used."""
    running = most = 0

    async def work(_delivery: Delivery[Job]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    await submit(js, *(f"job-{number}" for number in range(60)))
    bench = Bench(js, concurrency=5)
    bench.act = work
    await bench.until(lambda: len(bench.given) == 60)
    await bench.end()
    assert most == 5


async def test_long_work_is_not_given_to_somebody_else(js: JetStreamContext) -> None:
    """Heartbeats allow handlers that run longer than `ack_wait`."""
    bench, other = Bench(js), Bench(js)
    bench.act = other.act = lambda _delivery: asyncio.sleep(3.5 * CONSUMER.ack_wait_seconds)
    await submit(js, "long")
    await asyncio.sleep(3 * CONSUMER.ack_wait_seconds)
    await asyncio.gather(bench.end(), other.end())
    assert bench.given + other.given == [("long", 1)]
    assert await left(js) == 0


async def test_replicas_share_the_work(js: JetStreamContext) -> None:
    """Each message is delivered to one of them."""
    first, second = Bench(js, concurrency=2), Bench(js, concurrency=2)
    first.act = second.act = lambda _delivery: asyncio.sleep(0.01)
    await submit(js, *(f"job-{number}" for number in range(40)))
    async with asyncio.timeout(WAIT_SECONDS):
        while len(first.given) + len(second.given) < 40:  # noqa: ASYNC110  # of two workers
            await asyncio.sleep(0.02)
    await asyncio.gather(first.end(), second.end())
    assert len(set(first.given + second.given)) == 40
    assert first.given
    assert second.given


async def test_drain_finishes_what_runs_and_takes_no_more(js: JetStreamContext) -> None:
    """A replica that ends loses nothing and makes nobody wait for a timeout."""
    consumer = replace(CONSUMER, ack_wait_seconds=30.0)
    bench = Bench(js, consumer=consumer, concurrency=2)
    bench.act = lambda _delivery: asyncio.sleep(0.3)
    await submit(js, *(f"job-{number}" for number in range(10)))
    await bench.until(lambda: len(bench.given) == 2)
    await bench.end()
    taken = len(bench.given)
    assert await left(js) == 10 - taken
    other = Bench(js, consumer=consumer, concurrency=10)
    async with asyncio.timeout(5):
        await other.until(lambda: len(other.given) == 10 - taken)
    await other.end()
    assert all(attempt <= 2 for _, attempt in other.given)


async def test_what_drain_interrupts_goes_to_another_worker_at_once(js: JetStreamContext) -> None:
    """It is given back, not left to time out."""
    consumer = replace(CONSUMER, ack_wait_seconds=30.0)
    bench = Bench(js, consumer=consumer)
    bench.act = lambda _delivery: asyncio.sleep(WAIT_SECONDS)
    await submit(js, "long")
    await bench.until(lambda: len(bench.given) == 1)
    await bench.end(timeout_seconds=0.1)
    other = Bench(js, consumer=consumer)
    async with asyncio.timeout(5):
        await other.until(lambda: other.given == [("long", 2)])
    await other.end()


async def test_a_consumer_that_was_deleted_is_made_again(js: JetStreamContext) -> None:
    """Nobody needs to restart the worker."""
    bench = Bench(js)
    await submit(js, "before")
    await bench.until(lambda: len(bench.given) == 1)
    await js.delete_consumer(STREAM.name, CONSUMER.name)
    await submit(js, "after")
    await bench.until(lambda: ("after", 1) in bench.given)
    await bench.end()


def test_a_consumer_that_gives_up_needs_somebody_who_takes_over(js: JetStreamContext) -> None:
    """What was acknowledged to its publisher is never dropped in silence."""
    with pytest.raises(ValueError, match="on_exhausted"):
        PullWorker(js, CONSUMER, concurrency=1)
