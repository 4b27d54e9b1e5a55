"""`headrace.cost.v1.CostInternalService`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc
from typing_extensions import override

from libs.rpc.identity import Context
from services.cost.price_book import PriceBook
from services.cost.wire import price_to_proto


class CostInternalServicer(cost_internal_pb2_grpc.CostInternalServiceServicer):
    """Prices, for other services of the mesh."""

    def __init__(self, price_book: PriceBook) -> None:
        self._price_book = price_book

    @override
    async def WatchPrices(
        self, request: cost_internal_pb2.WatchPricesRequest, context: Context
    ) -> AsyncIterator[cost_internal_pb2.WatchPricesResponse]:
        async for prices in self._price_book.watch():
            yield cost_internal_pb2.WatchPricesResponse(
                prices=[price_to_proto(price) for price in prices]
            )
