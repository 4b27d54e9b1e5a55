"""The NATS server is killed while work goes on."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import COST, USAGE, USAGE_RECORDED
from libs.bus.worker import Delivery, PullWorker
from libs.errors import Unavailable
from tests.support.nats import NatsServer, running_nats

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

KILLS = 4
UP_SECONDS = 0.7
DOWN_SECONDS = 0.3
SETTLE_SECONDS = 30.0


async def test_killing_the_server_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Killed with -9 again and again, under load from both sides, on several connections."""
    async with running_nats(tmp_path) as server:
        publishing = await connect(server.url, name="publisher")
        working = await connect(server.url, name="worker")
        await ensure_streams(publishing.jetstream())
        ledger: set[str] = set()
        acknowledged: set[str] = set()

        async def book(delivery: Delivery[events_pb2.UsageRecorded]) -> None:
            await asyncio.sleep(0.005)
            ledger.add(delivery.message.usage_id)

        worker: PullWorker[events_pb2.UsageRecorded] = PullWorker(
            working.jetstream(), COST, concurrency=8
        )
        booking = asyncio.create_task(worker.run(book))
        stop = asyncio.Event()
        publisher = Publisher(publishing.jetstream())
        publishers = [
            asyncio.create_task(_publish_until(stop, publisher, f"p{n}", acknowledged))
            for n in range(4)
        ]
        await _kill_and_restart(server)
        stop.set()
        await asyncio.gather(*publishers)
        assert len(acknowledged) > 50
        await _until_empty(publishing.jetstream())
        await worker.drain()
        await booking
        assert acknowledged - ledger == set()
        await publishing.drain()
        await working.drain()


async def _publish_until(
    stop: asyncio.Event, publisher: Publisher, name: str, acknowledged: set[str]
) -> None:
    number = 0
    while not stop.is_set():
        usage_id = f"{name}-{number}"
        number += 1
        event = events_pb2.UsageRecorded(usage_id=usage_id)
        try:
            await publisher.publish(USAGE_RECORDED, event, message_id=usage_id, timeout_seconds=2.0)
        except Unavailable:
            continue
        acknowledged.add(usage_id)
        await asyncio.sleep(0.005)


async def _kill_and_restart(server: NatsServer) -> None:
    for _ in range(KILLS):
        await asyncio.sleep(UP_SECONDS)
        await server.kill()
        await asyncio.sleep(DOWN_SECONDS)
        await server.start()


async def _until_empty(js: JetStreamContext) -> None:
    async with asyncio.timeout(SETTLE_SECONDS):
        while (await js.stream_info(USAGE.name)).state.messages:  # noqa: ASYNC110  # the server's
            await asyncio.sleep(0.1)


async def test_work_continues_soon_after_a_restart(tmp_path: Path) -> None:
    """A worker that was idle when the server died is there again within seconds."""
    async with running_nats(tmp_path) as server:
        client = await connect(server.url, name="test")
        js = client.jetstream()
        await ensure_streams(js)
        done = asyncio.Event()

        async def book(_delivery: Delivery[events_pb2.UsageRecorded]) -> None:
            done.set()

        worker: PullWorker[events_pb2.UsageRecorded] = PullWorker(js, COST, concurrency=8)
        booking = asyncio.create_task(worker.run(book))
        await asyncio.sleep(0.3)
        await server.kill()
        await server.start()
        await Publisher(js).publish(
            USAGE_RECORDED, events_pb2.UsageRecorded(usage_id="a"), message_id="a",
            timeout_seconds=10,
        )  # fmt: skip
        async with asyncio.timeout(5):
            await done.wait()
        await worker.drain()
        await booking
        await client.drain()


async def test_a_store_that_was_wiped_is_made_again(tmp_path: Path) -> None:
    """After a restart with an empty store, streams and consumers are created again."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    async with running_nats(first) as server:
        client = await connect(server.url, name="test")
        js = client.jetstream()
        done = asyncio.Event()

        async def book(_delivery: Delivery[events_pb2.UsageRecorded]) -> None:
            done.set()

        worker: PullWorker[events_pb2.UsageRecorded] = PullWorker(js, COST, concurrency=8)
        booking = asyncio.create_task(worker.run(book))
        await asyncio.sleep(0.3)
        await server.kill()
        server.use_folder(second)
        await server.start()
        await Publisher(js).publish(
            USAGE_RECORDED, events_pb2.UsageRecorded(usage_id="a"), message_id="a",
            timeout_seconds=10,
        )  # fmt: skip
        async with asyncio.timeout(5):
            await done.wait()
        await worker.drain()
        await booking
        await client.drain()


async def test_a_worker_ends_while_the_server_is_away(tmp_path: Path) -> None:
    """A process that shuts down does not wait for NATS."""
    async with running_nats(tmp_path) as server:
        client = await connect(server.url, name="test")
        await ensure_streams(client.jetstream())

        async def book(_delivery: Delivery[events_pb2.UsageRecorded]) -> None:
            raise AssertionError("nothing was published")

        worker: PullWorker[events_pb2.UsageRecorded] = PullWorker(
            client.jetstream(), COST, concurrency=8
        )
        booking = asyncio.create_task(worker.run(book))
        await asyncio.sleep(0.3)
        await server.kill()
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            await worker.drain(1.0)
            await booking
            await client.drain()


DYING_WORKER = """
import asyncio, sys
from dataclasses import replace
from libs.bus.connection import connect
from libs.bus.subjects import COST
from libs.bus.worker import PullWorker

async def main(url):
    async def hang(delivery):
        print("started", flush=True)
        await asyncio.sleep(60)

    client = await connect(url, name="dying")
    consumer = replace(COST, ack_wait_seconds=1.0)
    await PullWorker(client.jetstream(), consumer, concurrency=1).run(hang)

asyncio.run(main(sys.argv[1]))
"""


async def test_the_work_of_a_killed_worker_goes_to_another(tmp_path: Path) -> None:
    """The message of a killed process is delivered again after `ack_wait`."""
    async with running_nats(tmp_path) as server:
        client = await connect(server.url, name="test")
        js = client.jetstream()
        await ensure_streams(js)
        event = events_pb2.UsageRecorded(usage_id="a")
        await Publisher(js).publish(USAGE_RECORDED, event, message_id="a")
        dying = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DYING_WORKER, server.url, stdout=asyncio.subprocess.PIPE
        )
        assert dying.stdout is not None
        while b"started" not in await dying.stdout.readline():
            pass
        dying.kill()
        await dying.wait()
        attempts: asyncio.Queue[int] = asyncio.Queue()

        async def book(delivery: Delivery[events_pb2.UsageRecorded]) -> None:
            attempts.put_nowait(delivery.attempt)

        consumer = replace(COST, ack_wait_seconds=1.0)
        worker: PullWorker[events_pb2.UsageRecorded] = PullWorker(js, consumer, concurrency=1)
        booking = asyncio.create_task(worker.run(book))
        async with asyncio.timeout(10):
            assert await attempts.get() == 2
        await worker.drain()
        await booking
        await client.drain()
