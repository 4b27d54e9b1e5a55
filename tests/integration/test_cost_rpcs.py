"""The RPCs of the cost service: a process, a real bus, a real database."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_internal_pb2, cost_pb2

from libs.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from libs.rpc.identity import Identity
from libs.rpc.names import tenant_name
from libs.rpc.status import headrace_errors
from tests.support.nats import running_nats
from tests.support.service import RunningService, running_service
from tests.support.usage import (
    BILLING,
    EVE,
    PRICE,
    READ,
    CostClient,
    UsageSource,
    free,
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
        yield CostClient(channel, who=Identity(f"tenant-{uuid.uuid4()}", "ann", READ))


def stamp(moment: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(moment)
    return made


async def test_the_ledger_has_the_cost_that_the_client_was_given(
    client: CostClient, source: UsageSource
) -> None:
    """To the nano-dollar, at once, with its postings; and so do the sums."""
    event = usage_event(who=client.who, prompt_tokens=17, completion_tokens=33, cached_tokens=5)
    await source.record(event)
    cost = await client.request_cost(event.request_id)
    assert cost.cost_nano_usd == event.cost_nano_usd == 34_136
    assert [
        (line.usage_kind, line.quantity, line.rate_nano_usd, line.cost_nano_usd)
        for line in cost.postings
    ] == [
        (usage_pb2.USAGE_KIND_PROMPT_TOKENS, 12, 123_456_789, 1_481),
        (usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS, 5, 12_345_678, 62),
        (usage_pb2.USAGE_KIND_COMPLETION_TOKENS, 33, 987_654_321, 32_593),
    ]
    assert {(line.kind, line.rate_per_quantity) for line in cost.postings} == {
        (cost_pb2.POSTING_KIND_CHARGE, 1_000_000)
    }
    assert {(line.price, line.usage_id) for line in cost.postings} == {(PRICE.name, event.usage_id)}
    assert (cost.tenant, cost.user, cost.model_version) == (
        tenant_name(client.who.tenant),
        "ann",
        event.model_version,
    )

    sums = await client.usage()
    assert sums.totals == cost_pb2.UsageTotals(
        request_count=1,
        usage=usage_pb2.TokenUsage(prompt_tokens=17, completion_tokens=33, cached_tokens=5),
        cost_nano_usd=34_136,
    )
    assert list(sums.rows) == [
        cost_pb2.UsageRow(
            tenant=tenant_name(client.who.tenant), user="ann", model="smollm2", totals=sums.totals
        )
    ]


async def test_an_event_that_comes_again_is_booked_once(
    client: CostClient, source: UsageSource
) -> None:
    """Also where it comes as another message."""
    event = usage_event(who=client.who)
    for copy in range(5):
        await source.record(event, message_id=f"{event.usage_id}-{copy}")
    assert (await client.request_cost(event.request_id)).cost_nano_usd == event.cost_nano_usd
    assert (await client.usage()).totals.cost_nano_usd == event.cost_nano_usd


async def test_a_reported_cost_stands_and_the_difference_is_logged(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """A wrong cost is booked with an adjustment and reported as an error."""
    event = usage_event(who=client.who, cost_nano_usd=40_000)
    await source.record(event)
    booked = await client.request_cost(event.request_id)
    assert booked.cost_nano_usd == sum(line.cost_nano_usd for line in booked.postings) == 40_000
    assert booked.postings[-1].kind == cost_pb2.POSTING_KIND_ADJUSTMENT
    assert booked.postings[-1].usage_kind == usage_pb2.USAGE_KIND_UNSPECIFIED
    assert booked.postings[-1].cost_nano_usd == 40_000 - 34_136
    assert event.usage_id in "".join(
        line for line in cost.log.read_text().splitlines() if "another cost than" in line
    )


async def test_usage_that_cannot_be_booked_is_logged_with_a_reason(
    client: CostClient, source: UsageSource, cost: RunningService
) -> None:
    """The next event is booked, and the log has all of the one that was dropped."""
    bad = usage_event(who=client.who, completion_tokens=2**31 + 1)
    good = usage_event(who=client.who)
    await source.record(bad)
    await source.record(good)
    assert (await client.request_cost(good.request_id)).cost_nano_usd == good.cost_nano_usd
    (line,) = [
        line for line in cost.log.read_text().splitlines() if "usage that cannot be booked" in line
    ]
    assert bad.usage_id in line
    assert str(bad.cost_nano_usd) in line
    assert json.loads(line)["reason"] == "impossible_count"


async def test_tenants_see_their_own(client: CostClient, source: UsageSource) -> None:
    """For others its requests do not exist, and its sums require the scope `billing`."""
    event = usage_event(who=client.who)
    await source.record(event)
    await client.request_cost(event.request_id)
    with pytest.raises(NotFound) as missing, headrace_errors():
        await client.request_cost(event.request_id, who=EVE)
    assert missing.value.reason == "RESOURCE_NOT_FOUND"
    with pytest.raises(PermissionDenied) as denied, headrace_errors():
        await client.usage(who=EVE, tenant=tenant_name(client.who.tenant))
    assert (denied.value.reason, denied.value.metadata) == ("SCOPE_MISSING", {"scope": "billing"})
    assert (await client.usage(who=EVE)).rows == []
    with pytest.raises(PermissionDenied), headrace_errors():
        await client.usage(tenant="tenants/-")
    admin = Identity("evil", "root", READ | {"billing"})
    theirs = await client.usage(who=admin, tenant=tenant_name(client.who.tenant))
    assert theirs.totals.cost_nano_usd == event.cost_nano_usd
    everybody = await client.usage(who=admin, tenant="tenants/-", page_size=1000)
    assert tenant_name(client.who.tenant) in {row.tenant for row in everybody.rows}
    own = await client.usage(tenant=tenant_name(client.who.tenant))
    assert own.totals.cost_nano_usd == event.cost_nano_usd


async def test_sums_cover_the_time_of_the_query(client: CostClient, source: UsageSource) -> None:
    """From the start, up to but without the end; also in buckets, by page."""
    start = datetime(2026, 11, 1, tzinfo=UTC)
    for hour in range(3):
        await source.record(
            usage_event(who=client.who, event_time=stamp(start + timedelta(hours=hour)))
        )
    two = await client.usage(start_time=stamp(start + timedelta(hours=1)))
    assert two.rows[0].totals.request_count == 2
    one = await client.usage(
        start_time=stamp(start), end_time=stamp(start + timedelta(hours=1)), filter='user = "ann"'
    )
    assert one.rows[0].totals.request_count == 1
    hours = await client.usage(time_bucket=cost_pb2.TIME_BUCKET_HOUR, page_size=2)
    rest = await client.usage(
        time_bucket=cost_pb2.TIME_BUCKET_HOUR, page_size=2, page_token=hours.next_page_token
    )
    assert [row.bucket_start_time for row in [*hours.rows, *rest.rows]] == [
        stamp(start + timedelta(hours=hour)) for hour in range(3)
    ]
    assert hours.totals == rest.totals
    assert (rest.totals.request_count, rest.next_page_token) == (3, "")
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.usage(start_time=stamp(start), end_time=stamp(start))
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.usage(start_time=Timestamp(seconds=2**61))


@pytest.mark.parametrize("request_id", ["", "7", str(uuid.uuid4()).upper()])
async def test_an_invalid_request_id_is_refused(client: CostClient, request_id: str) -> None:
    """It must be a UUID in its canonical form."""
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.request_cost(request_id)
    assert caught.value.field_violations[0][0] == "request_id"


async def test_a_caller_without_identity_is_refused(client: CostClient) -> None:
    """The edge always adds one."""
    with pytest.raises(Unauthenticated), headrace_errors():
        await client.stub.QueryUsage(cost_pb2.QueryUsageRequest())


async def test_prices_never_change(client: CostClient) -> None:
    """The same again is OK, other content is not; and only admins create prices."""
    again = await client.create_price()
    assert again.name == PRICE.name
    assert again.HasField("create_time")
    assert not again.HasField("effective_time")
    other = free(PRICE.name.removeprefix("prices/"), "minilm")
    with pytest.raises(AlreadyExists) as exists, headrace_errors():
        await client.create_price(other)
    assert exists.value.metadata == {"resource": PRICE.name}
    with pytest.raises(PermissionDenied), headrace_errors():
        await client.create_price(other, who=client.who)
    listed = await client.prices(filter='model = "smollm2"')
    assert list(listed.prices) == [again]


async def test_a_price_of_a_tenant_is_listed_for_it_and_for_admins(client: CostClient) -> None:
    """Others do not see what a tenant pays."""
    own = free(f"own-{uuid.uuid4()}", "private", tenant=tenant_name(client.who.tenant))
    await client.create_price(own)
    for who, expected in ((client.who, [own.name]), (EVE, []), (BILLING, [own.name])):
        listed = await client.prices(who=who, filter='model = "private"')
        assert [price.name for price in listed.prices] == expected
    watch = client.watch_prices()
    assert own.name in {price.name for price in (await anext(aiter(watch))).prices}
    watch.cancel()


async def test_watchers_get_the_price_book_at_once_and_after_each_change(
    client: CostClient,
) -> None:
    """A price that takes effect later is pushed together with the one that it replaces."""

    async def create(name: str, **fields: Any) -> None:
        await client.create_price(free(name, "watched", **fields))

    def names(pushed: cost_internal_pb2.WatchPricesResponse) -> list[str]:
        return [price.name for price in pushed.prices if price.model == "watched"]

    await create("first")
    watch = client.watch_prices()
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
    """When the stream is empty, there is nothing to wait for."""
    await source.record(usage_event(who=client.who))
    async with asyncio.timeout(1.5):
        with pytest.raises(NotFound), headrace_errors():
            await client.request_cost(str(uuid.uuid4()))
