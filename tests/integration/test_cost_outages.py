"""The cost service killed, started late, without its bus, and beside a replica."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import Unavailable
from libs.rpc.status import headrace_errors
from tests.support.nats import NatsServer, running_nats
from tests.support.service import RunningService, running_service
from tests.support.usage import (
    CostClient,
    UsageSource,
    free,
    usage_event,
    usage_source,
)

pytestmark = pytest.mark.integration


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    folder = tmp_path / "nats"
    folder.mkdir()
    async with running_nats(folder) as server:
        yield server


@pytest.fixture
async def source(nats: NatsServer) -> AsyncIterator[UsageSource]:
    async with usage_source(nats.url) as made:
        yield made


@pytest.fixture
async def cost(nats: NatsServer, tmp_path: Path) -> AsyncIterator[RunningService]:
    home = tmp_path / "home"
    home.mkdir()
    async with running_service(
        "cost", home, HEADRACE_NATS_URL=nats.url, HEADRACE_PRICE_POLL_SECONDS="0.2"
    ) as service:
        yield service


@pytest.fixture
async def client(cost: RunningService) -> AsyncIterator[CostClient]:
    async with cost.channel() as channel:
        made = CostClient(channel)
        await made.create_price()
        yield made


def stamp(moment: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(moment)
    return made


async def test_a_reader_waits_for_usage_from_before_the_start(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """The first reader sees everything that the bus had acknowledged."""
    await cost.kill()
    events = [usage_event() for _ in range(300)]
    await asyncio.gather(*(source.record(event) for event in events))
    await cost.start()
    sums = await client.usage()
    assert sums.totals.cost_nano_usd == sum(event.cost_nano_usd for event in events)
    assert sums.totals.request_count == 300


async def test_a_kill_while_it_books_loses_and_doubles_nothing(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """Killed -9 again and again in the middle of a stream of events, half of them sent twice."""
    events = [usage_event() for _ in range(600)]
    recorded = 0
    went_on = asyncio.Condition()

    async def record_all() -> None:
        nonlocal recorded
        for begin in range(0, len(events), 30):
            lot = events[begin : begin + 30]
            twice = [
                source.record(event, message_id=f"again-{event.usage_id}") for event in lot[::2]
            ]
            await asyncio.gather(*(source.record(event) for event in lot), *twice)
            async with went_on:
                recorded = begin + 30
                went_on.notify_all()

    recording = asyncio.create_task(record_all())
    for done_by_then in (90, 240, 390):
        async with went_on:
            await went_on.wait_for(lambda: recorded >= done_by_then)  # noqa: B023  # at once
        await cost.kill()
        await cost.start()
    await recording
    async with asyncio.timeout(60):  # messages of killed processes come again after ten seconds
        while (sums := await client.usage()).totals.request_count < len(events):
            pass  # each call waits for what is not booked yet
    assert sums.totals.cost_nano_usd == sum(event.cost_nano_usd for event in events)
    for event in events[::60]:
        booked = await client.request_cost(event.request_id)
        assert booked.cost_nano_usd == event.cost_nano_usd


async def test_two_replicas_share_the_work_and_one_ledger(
    client: CostClient, source: UsageSource, cost: RunningService, nats: NatsServer, tmp_path: Path
) -> None:
    """Both book into one database; a price created at one is pushed by the other."""
    home = tmp_path / "second"
    home.mkdir()
    database_url = f"sqlite+aiosqlite:///{tmp_path}/home/data/cost.db"
    async with running_service(
        "cost",
        home,
        HEADRACE_NATS_URL=nats.url,
        HEADRACE_DATABASE_URL=database_url,
        HEADRACE_PRICE_POLL_SECONDS="0.2",
    ) as second:
        async with second.channel() as channel:
            other = CostClient(channel)
            watch = aiter(other.watch_prices())
            await anext(watch)
            await client.create_price(free("minilm", "minilm"))
            async with asyncio.timeout(10):
                assert len((await anext(watch)).prices) == 2

            events = [usage_event() for _ in range(400)]
            copies = [
                source.record(event, message_id=f"{copy}-{event.usage_id}")
                for event in events
                for copy in range(2)
            ]
            await asyncio.gather(*copies)
            total = sum(event.cost_nano_usd for event in events)
            assert (await client.usage()).totals.cost_nano_usd == total
            assert (await other.usage()).totals.cost_nano_usd == total
        assert await second.terminate() == 0


async def test_without_the_bus_the_ledger_still_answers(
    client: CostClient, source: UsageSource, nats: NatsServer
) -> None:
    """Booked usage is returned after the wait; other requests may not be booked yet."""
    event = usage_event()
    await source.record(event)
    await client.request_cost(event.request_id)
    await nats.kill()
    assert (await client.request_cost(event.request_id)).cost_nano_usd == event.cost_nano_usd
    with pytest.raises(Unavailable) as caught, headrace_errors():
        await client.request_cost(str(uuid.uuid4()))
    assert caught.value.retry_after_seconds is not None
    await nats.start()
    late = usage_event()
    await source.record(late)
    async with asyncio.timeout(15):
        while True:
            try:
                assert (await client.request_cost(late.request_id)).cost_nano_usd > 0
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.2)


async def test_it_stops_gracefully(client: CostClient, cost: RunningService) -> None:
    """On SIGTERM, also with a watcher, whose stream ends."""
    watch = aiter(client.watch_prices())
    await anext(watch)
    assert await cost.terminate() == 0
    with pytest.raises(StopAsyncIteration):
        await anext(watch)
