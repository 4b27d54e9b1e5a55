"""What the hot path holds in hand: routes and prices, pushed by `router` and `cost`."""

from __future__ import annotations

from collections.abc import Callable

from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.router.v1 import router_internal_pb2, router_internal_pb2_grpc

from libs.metering.prices import PriceBook
from libs.process import Process
from libs.routes import RouteTable
from libs.rpc.channel import open_channel
from libs.rpc.watch import SnapshotWatch


class Snapshots:
    """Keeps routes and prices current. The process is ready when it has heard of both."""

    def __init__(
        self,
        *,
        router_address: str,
        cost_address: str,
        on_routes: Callable[[RouteTable], None],
        on_prices: Callable[[PriceBook], None],
        running: Process,
    ) -> None:
        router = router_internal_pb2_grpc.RouterInternalServiceStub(
            open_channel(router_address, traced=False)
        )
        cost = cost_pb2_grpc.CostServiceStub(open_channel(cost_address, traced=False))
        self._running = running
        self._on_routes = on_routes
        self._on_prices = on_prices
        self._routes_in_hand: RouteTable | None = None
        self._prices_known = False
        self._routes = SnapshotWatch(
            "router",
            open_stream=lambda: router.WatchRoutes(router_internal_pb2.WatchRoutesRequest()),
            on_snapshot=self._take_routes,
            clock=running.clock,
        )
        self._prices = SnapshotWatch(
            "cost",
            open_stream=lambda: cost.WatchPrices(cost_pb2.WatchPricesRequest()),
            on_snapshot=self._take_prices,
            clock=running.clock,
        )

    def start(self) -> None:
        """Begins to watch, beside the server."""
        self._running.spawn(self._routes.run())
        self._running.spawn(self._prices.run())
        self._running.spawn(self._become_ready())

    def _take_routes(self, snapshot: router_internal_pb2.WatchRoutesResponse) -> None:
        known = self._routes_in_hand
        if known is not None and not known.is_replaced_by(snapshot):
            return
        self._routes_in_hand = RouteTable.of(snapshot)
        # Without prices no request may go anywhere: its cost would be wrong.
        if self._prices_known:
            self._on_routes(self._routes_in_hand)

    def _take_prices(self, snapshot: cost_pb2.WatchPricesResponse) -> None:
        self._on_prices(PriceBook(snapshot.prices))
        if not self._prices_known and self._routes_in_hand is not None:
            self._on_routes(self._routes_in_hand)
        self._prices_known = True

    async def _become_ready(self) -> None:
        await self._routes.wait_first()
        await self._prices.wait_first()
        await self._running.server.set_ready(True)
