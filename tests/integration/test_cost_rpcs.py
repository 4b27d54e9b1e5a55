"""The cost service as its callers see it: a process, a real bus, a real database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.cost.v1 import cost_pb2

from libs.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors
from tests.support.nats import running_nats
from tests.support.service import RunningService, running_service
from tests.support.usage import (
    EVE,
    PRICE,
    CostClient,
    UsageSource,
    usage_event,
    usage_source,
)

# One process for all of them: each test has a tenant of its own.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def source(nats_url: str) -> AsyncIterator[UsageSource]:
    async with usage_source(nats_url) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cost(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningService]:
    home = tmp_path_factory.mktemp("cost")
    async with running_service("cost", home, HEADRACE_NATS_URL=nats_url) as service:
        async with service.channel() as channel:
            await CostClient(channel).create_price()
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def client(cost: RunningService) -> AsyncIterator[CostClient]:
    async with cost.channel() as channel:
        yield CostClient(channel, who=Identity(f"tenant-{uuid.uuid4()}", "ann"))


def stamp(moment: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(moment)
    return made


async def test_the_ledger_says_what_the_client_was_told(
    client: CostClient, source: UsageSource
) -> None:
    """To the nano-dollar, at once, with its lines; and so do the sums."""
    event = usage_event(who=client.who, prompt_tokens=17, completion_tokens=33, cached_tokens=5)
    await source.record(event)
    cost = await client.request_cost(event.request_id)
    assert cost.cost_nano_usd == event.cost_nano_usd == 34_136
    assert [(line.kind, line.quantity_tokens, line.cost_nano_usd) for line in cost.postings] == [
        ("input", 12, 1_481),
        ("cached_input", 5, 62),
        ("output", 33, 32_593),
    ]
    assert {(line.price, line.usage_id) for line in cost.postings} == {(PRICE.name, event.usage_id)}
    assert (cost.tenant, cost.user, cost.model_version) == (
        client.who.tenant,
        "ann",
        event.model_version,
    )

    sums = await client.usage()
    assert sums.cost_nano_usd == 34_136
    assert list(sums.rows) == [
        cost_pb2.UsageRow(
            tenant=client.who.tenant,
            user="ann",
            model="smollm2",
            request_count=1,
            prompt_tokens=17,
            completion_tokens=33,
            cached_tokens=5,
            cost_nano_usd=34_136,
        )
    ]


async def test_an_event_that_comes_again_is_booked_once(
    client: CostClient, source: UsageSource
) -> None:
    """Also where the bus takes it for another message."""
    event = usage_event(who=client.who)
    for copy in range(5):
        await source.record(event, message_id=f"{event.usage_id}-{copy}")
    assert (await client.request_cost(event.request_id)).cost_nano_usd == event.cost_nano_usd
    assert (await client.usage()).cost_nano_usd == event.cost_nano_usd


async def test_what_was_told_stands_and_the_difference_shows(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """A wrong cost is an adjustment, and somebody is told."""
    event = usage_event(who=client.who, cost_nano_usd=40_000)
    await source.record(event)
    booked = await client.request_cost(event.request_id)
    assert booked.cost_nano_usd == sum(line.cost_nano_usd for line in booked.postings) == 40_000
    assert booked.postings[-1].kind == "adjustment"
    assert booked.postings[-1].cost_nano_usd == 40_000 - 34_136
    assert event.usage_id in "".join(
        line for line in cost.log.read_text().splitlines() if "another cost than" in line
    )


async def test_usage_that_nobody_can_book_is_told_whole_and_holds_up_nothing(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """The next event is booked, and the log has what was dropped."""
    bad = usage_event(who=Identity("", "ann"))
    good = usage_event(who=client.who)
    await source.record(bad)
    await source.record(good)
    assert (await client.request_cost(good.request_id)).cost_nano_usd == good.cost_nano_usd
    (line,) = [
        line for line in cost.log.read_text().splitlines() if "usage that cannot be booked" in line
    ]
    assert bad.usage_id in line
    assert str(bad.cost_nano_usd) in line


async def test_tenants_see_their_own(client: CostClient, source: UsageSource) -> None:
    """Another tenant's request does not exist; its sums need the scope `admin`."""
    event = usage_event(who=client.who)
    await source.record(event)
    await client.request_cost(event.request_id)
    with pytest.raises(NotFound) as missing, headrace_errors():
        await client.request_cost(event.request_id, who=EVE)
    assert missing.value.reason == "RESOURCE_NOT_FOUND"
    with pytest.raises(PermissionDenied) as denied, headrace_errors():
        await client.usage(who=EVE, tenant=client.who.tenant)
    assert (denied.value.reason, denied.value.metadata) == ("SCOPE_MISSING", {"scope": "admin"})
    assert (await client.usage(who=EVE)).rows == []
    anybody = Identity("evil", "root", frozenset({"admin"}))
    assert (
        await client.usage(who=anybody, tenant=client.who.tenant)
    ).cost_nano_usd == event.cost_nano_usd


async def test_sums_cover_the_time_that_was_asked_for(
    client: CostClient, source: UsageSource
) -> None:
    """From the start, up to but without the end."""
    start = datetime(2026, 11, 1, tzinfo=UTC)
    for hour in range(3):
        await source.record(
            usage_event(who=client.who, event_time=stamp(start + timedelta(hours=hour)))
        )
    two = await client.usage(start_time=stamp(start + timedelta(hours=1)))
    assert two.rows[0].request_count == 2
    one = await client.usage(
        start_time=stamp(start), end_time=stamp(start + timedelta(hours=1)), user="ann"
    )
    assert one.rows[0].request_count == 1
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.usage(start_time=stamp(start), end_time=stamp(start))
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.usage(start_time=Timestamp(seconds=2**61))


@pytest.mark.parametrize("request_id", ["", "7", str(uuid.uuid4()).upper()])
async def test_a_request_id_that_is_none_is_refused(client: CostClient, request_id: str) -> None:
    """It could not have been recorded."""
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.request_cost(request_id)
    assert caught.value.field_violations[0][0] == "request_id"


async def test_a_caller_without_identity_is_refused(client: CostClient) -> None:
    """The edge always names one."""
    with pytest.raises(Unauthenticated), headrace_errors():
        await client.stub.QueryUsage(cost_pb2.QueryUsageRequest())


async def test_prices_never_change(client: CostClient) -> None:
    """The same again is fine, other content is not, and not everybody may."""
    again = await client.create_price()
    assert again.name == PRICE.name
    assert again.HasField("create_time")
    assert not again.HasField("effective_time")
    other = cost_pb2.Price(name=PRICE.name, model="minilm")
    with pytest.raises(AlreadyExists) as exists, headrace_errors():
        await client.create_price(other)
    assert exists.value.metadata == {"resource": PRICE.name}
    with pytest.raises(PermissionDenied), headrace_errors():
        await client.create_price(other, who=client.who)
    listed = await client.stub.ListPrices(cost_pb2.ListPricesRequest(model="smollm2"))
    assert list(listed.prices) == [again]


async def test_watchers_get_the_book_at_once_and_whenever_it_grows(client: CostClient) -> None:
    """The price that replaces another comes with it as long as it is still to come."""

    async def create(name: str, **fields: Any) -> None:
        await client.create_price(cost_pb2.Price(name=f"prices/{name}", model="watched", **fields))

    def names(pushed: cost_pb2.WatchPricesResponse) -> list[str]:
        return [price.name for price in pushed.prices if price.model == "watched"]

    await create("first")
    watch = client.stub.WatchPrices(cost_pb2.WatchPricesRequest())
    messages = aiter(watch)
    async with asyncio.timeout(10):
        assert names(await anext(messages)) == ["prices/first"]
        await create("later", effective_time=stamp(datetime.now(UTC) + timedelta(days=1)))
        assert names(await anext(messages)) == ["prices/later", "prices/first"]
        await create("second")
        assert names(await anext(messages)) == ["prices/later", "prices/second"]
    watch.cancel()


async def test_a_request_that_used_nothing_is_not_found_at_once(
    client: CostClient, source: UsageSource
) -> None:
    """With nothing left in the stream there is nothing to wait for."""
    await source.record(usage_event(who=client.who))
    async with asyncio.timeout(1.5):
        with pytest.raises(NotFound), headrace_errors():
            await client.request_cost(str(uuid.uuid4()))
