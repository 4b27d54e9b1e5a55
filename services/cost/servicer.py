"""`headrace.cost.v1.CostService`."""

from __future__ import annotations

from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import AlreadyExists, NotFound, Unavailable
from libs.ids import check_uuid
from libs.rpc.access import BILLING
from libs.rpc.identity import Context, identity_of
from libs.rpc.names import tenant_name
from libs.rpc.paging import PageRequest
from services.cost.backlog import UsageBacklog
from services.cost.price_book import PriceBook
from services.cost.store import CostStore
from services.cost.usage_store import UsageStore
from services.cost.usage_wire import query_from_proto, sums_to_proto
from services.cost.wire import (
    price_filter_from_proto,
    price_from_proto,
    price_to_proto,
    request_cost_to_proto,
)

RETRY_AFTER_SECONDS = 1.0


class CostServicer(cost_pb2_grpc.CostServiceServicer):
    """Prices and costs, for clients of the mesh."""

    def __init__(
        self,
        *,
        store: CostStore,
        usage: UsageStore,
        price_book: PriceBook,
        backlog: UsageBacklog,
        clock: Clock,
    ) -> None:
        self._store = store
        self._usage = usage
        self._price_book = price_book
        self._backlog = backlog
        self._clock = clock

    @override
    async def CreatePrice(
        self, request: cost_pb2.CreatePriceRequest, _context: Context
    ) -> cost_pb2.CreatePriceResponse:
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
        identity = identity_of(context)
        wanted = price_filter_from_proto(
            request.filter, visible_to=None if BILLING in identity.scopes else identity.tenant
        )
        page = await self._store.list_prices(
            wanted, PageRequest.parse(request.page_size, request.page_token)
        )
        return cost_pb2.ListPricesResponse(
            prices=[price_to_proto(price) for price in page.rows],
            next_page_token=page.next_page_token,
        )

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
        if request.tenant not in ("", tenant_name(identity.tenant)):
            identity.require(BILLING)
        query = query_from_proto(request, caller_tenant=identity.tenant)
        page = PageRequest.parse(request.page_size, request.page_token)
        await self._backlog.wait_booked()
        return sums_to_proto(await self._usage.sum_usage(query, page))
