"""Usage records share messages, and none is lost on its way to the ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from headrace.common.v1 import usage_pb2
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect, ensure_streams
from libs.bus.delivery import Delivery, PoisonMessage
from libs.bus.publisher import Publisher
from libs.bus.subjects import MESSAGE_TYPES, USAGE, USAGE_BATCH_RECORDED, USAGE_RECORDED
from libs.clock import SystemClock
from libs.db import create_engine, migrate
from libs.errors import Unavailable
from libs.metering.batches import UsageBatches
from services.cost.consumer import UsageConsumer
from services.cost.ledger import Ledger
from services.cost.price_book import PriceBook
from services.cost.store import CostStore
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.integration


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with running_nats(tmp_path) as running:
        yield running


@pytest.fixture
async def js(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    client = await connect(server.url, name="test")
    await ensure_streams(client.jetstream())
    yield client.jetstream()
    await client.drain()


def record(number: int, **fields: Any) -> events_pb2.UsageRecorded:
    event = events_pb2.UsageRecorded(
        usage_id=f"usage-{number:04}",
        request_id=f"request-{number:04}",
        identity=events_pb2.Identity(tenant="tenants/acme", user="ann"),
        model="smollm2",
        model_version="models/smollm2/versions/1.0.0",
        operation=usage_pb2.OPERATION_GENERATE,
        **fields,
    )
    event.event_time.FromDatetime(datetime(2026, 11, 1, tzinfo=UTC))
    return event


async def stored(js: JetStreamContext) -> tuple[int, Counter[str]]:
    """Returns how many messages the stream has, and how often each record is in them."""
    state = (await js.stream_info(USAGE.name)).state
    found: Counter[str] = Counter()
    for sequence in range(state.first_seq, state.last_seq + 1):
        message = await js.get_msg(USAGE.name, sequence)
        event: Any = MESSAGE_TYPES[message.subject or ""].FromString(message.data or b"")
        records = event.records if message.subject == USAGE_BATCH_RECORDED else [event]
        found.update(each.usage_id for each in records)
    return state.messages, found


async def test_records_that_come_together_share_messages(js: JetStreamContext) -> None:
    """A hundred calls at once need few messages; each record is stored once."""
    batches = UsageBatches(Publisher(js), timeout_seconds=10)
    await asyncio.gather(*(batches.publish(record(number)) for number in range(100)))
    messages, found = await stored(js)
    assert found == {f"usage-{number:04}": 1 for number in range(100)}
    assert messages < 10


async def test_a_record_alone_is_published_as_itself(js: JetStreamContext) -> None:
    """It does not wait for others."""
    batches = UsageBatches(Publisher(js), timeout_seconds=10)
    await batches.publish(record(1))
    message = await js.get_msg(USAGE.name, 1)
    assert message.subject == USAGE_RECORDED


async def test_usage_of_a_cancelled_caller_is_recorded(js: JetStreamContext) -> None:
    """A caller that is cancelled while its record waits does not withdraw it."""
    batches = UsageBatches(Publisher(js), timeout_seconds=10)
    callers = [asyncio.create_task(batches.publish(record(number))) for number in range(20)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await batches.drain()
    assert len((await stored(js))[1]) == 20


async def test_a_record_that_was_stored_before_drops_no_other(js: JetStreamContext) -> None:
    """The bus drops a message with an id that it has seen: never a batch of several records."""
    batches = UsageBatches(Publisher(js), timeout_seconds=10)
    await batches.publish(record(0))
    first = asyncio.create_task(batches.publish(record(1)))
    await asyncio.sleep(0)  # it is on its way; those that follow make a batch
    await asyncio.gather(first, *(batches.publish(record(number)) for number in (0, 2, 3)))
    assert set((await stored(js))[1]) == {f"usage-{number:04}" for number in range(4)}


async def test_a_restart_of_the_bus_loses_nothing(server: NatsServer, js: JetStreamContext) -> None:
    """Callers wait; the record of each call that returned is in the stream."""
    batches = UsageBatches(Publisher(js), timeout_seconds=10)
    callers = []
    for number in range(60):
        callers.append(asyncio.create_task(batches.publish(record(number))))
        await asyncio.sleep(0.005)
        if number == 30:
            await server.kill()
            await server.start()
    await asyncio.gather(*callers)
    assert set((await stored(js))[1]) == {f"usage-{number:04}" for number in range(60)}


async def test_each_caller_has_its_own_timeout(server: NatsServer, js: JetStreamContext) -> None:
    """While the bus is down, each call fails at its own timeout, not earlier."""
    batches = UsageBatches(Publisher(js), timeout_seconds=0.5)
    await batches.publish(record(0))
    await server.kill()
    now = asyncio.get_running_loop().time

    async def waited(number: int) -> float:
        await asyncio.sleep(0.1 * number)
        started = now()
        with pytest.raises(Unavailable):
            await batches.publish(record(number))
        return now() - started

    times = await asyncio.gather(*(waited(number) for number in range(1, 6)))
    assert all(0.4 < seconds < 1.5 for seconds in times), times


async def test_one_bad_record_does_not_stop_the_others_of_its_batch(tmp_path: Path) -> None:
    """They are booked once, however often the batch comes; then it is a poison message."""
    url = f"sqlite+aiosqlite:///{tmp_path}/cost.db"
    await migrate(url, "cost")
    engine = create_engine(url)
    store = CostStore(engine)
    clock = SystemClock()
    consumer = UsageConsumer(Ledger(store, PriceBook(store, clock, poll_seconds=60), clock))
    bad = record(1)
    bad.identity.Clear()
    batch = events_pb2.UsageBatchRecorded(records=[record(0), bad, record(2)])
    delivery = Delivery[events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded](
        message=batch, subject=USAGE_BATCH_RECORDED, attempt=1, message_id="", headers={},
        _raw=cast("Any", None),
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(PoisonMessage):
            await consumer.handle(delivery)
    for number, booked in ((0, True), (1, False), (2, True)):
        cost = await store.request_cost("acme", f"request-{number:04}")
        assert (cost is not None) == booked
    await engine.dispose()
