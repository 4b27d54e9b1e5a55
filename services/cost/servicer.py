"""`headrace.cost.v1.CostService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from libs.ids import check_uuid
from libs.rpc.access import ADMIN
from libs.rpc.identity import Context, identity_of
from libs.rpc.paging import PageRequest
from services.cost.backlog import UsageBacklog
from services.cost.domain import UsageFilter, checked_sum
from services.cost.price_book import PriceBook
from services.cost.store import CostStore
from services.cost.wire import (
    price_from_proto,
    price_to_proto,
    request_cost_to_proto,
    time_from_proto,
    usage_row_to_proto,
)

MAX_USAGE_ROWS = 10_000
RETRY_AFTER_SECONDS = 1.0


class CostServicer(cost_pb2_grpc.CostServiceServicer):
    """Parses, asks the store or the price book, answers."""

    def __init__(
        self, *, store: CostStore, price_book: PriceBook, backlog: UsageBacklog, clock: Clock
    ) -> None:
        self._store = store
        self._price_book = price_book
        self._backlog = backlog
        self._clock = clock

    @override
    async def CreatePrice(
        self, request: cost_pb2.CreatePriceRequest, context: Context
    ) -> cost_pb2.CreatePriceResponse:
        identity_of(context).require(ADMIN)
        price = price_from_proto(request.price, create_time=self._clock.now())
        price.check()
        stored = await self._price_book.create(price)
        if not stored.same_content(price):
            raise AlreadyExists.of_resource(price.name)
        return cost_pb2.CreatePriceResponse(price=price_to_proto(stored))

    @override
    async def ListPrices(
        self, request: cost_pb2.ListPricesRequest, context: Context
    ) -> cost_pb2.ListPricesResponse:
        page = await self._store.list_prices(
            request.model, PageRequest.parse(request.page_size, request.page_token)
        )
        return cost_pb2.ListPricesResponse(
            prices=[price_to_proto(price) for price in page.rows],
            next_page_token=page.next_page_token,
        )

    @override
    async def WatchPrices(
        self, request: cost_pb2.WatchPricesRequest, context: Context
    ) -> AsyncIterator[cost_pb2.WatchPricesResponse]:
        async for prices in self._price_book.watch():
            yield cost_pb2.WatchPricesResponse(prices=[price_to_proto(price) for price in prices])

    @override
    async def GetRequestCost(
        self, request: cost_pb2.GetRequestCostRequest, context: Context
    ) -> cost_pb2.GetRequestCostResponse:
        tenant = identity_of(context).tenant
        request_id = check_uuid(request.request_id, field="request_id")
        all_booked = await self._backlog.wait_booked()
        cost = await self._store.request_cost(tenant, request_id)
        if cost is not None:
            return request_cost_to_proto(request_id, cost)
        if all_booked:
            raise NotFound.of_resource(f"requests/{request_id}")
        raise Unavailable(
            "the ledger is behind; the request may not be booked yet",
            reason="DEPENDENCY_UNAVAILABLE",
            metadata={"dependency": "nats"},
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )

    @override
    async def QueryUsage(
        self, request: cost_pb2.QueryUsageRequest, context: Context
    ) -> cost_pb2.QueryUsageResponse:
        identity = identity_of(context)
        if request.tenant not in ("", identity.tenant):
            identity.require(ADMIN)
        wanted = UsageFilter(
            tenant=request.tenant or identity.tenant,
            user=request.user or None,
            model=request.model or None,
            start_time=_bound(request.start_time, "start_time", request.HasField("start_time")),
            end_time=_bound(request.end_time, "end_time", request.HasField("end_time")),
        )
        wanted.check()
        await self._backlog.wait_booked()
        rows = await self._store.sum_usage(wanted, limit=MAX_USAGE_ROWS + 1)
        if len(rows) > MAX_USAGE_ROWS:
            raise InvalidArgument.of_field("user", f"more than {MAX_USAGE_ROWS} rows; ask for less")
        return cost_pb2.QueryUsageResponse(
            rows=[usage_row_to_proto(row) for row in rows],
            cost_nano_usd=checked_sum([row.cost_nano_usd for row in rows], field="start_time"),
        )


def _bound(stamp: Timestamp, field: str, given: bool) -> datetime | None:
    return time_from_proto(stamp, field=field) if given else None
