"""The current routes and prices, pushed by `router` and `cost`, and looked up in memory."""

from __future__ import annotations

from collections.abc import Callable

from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc
from headrace.router.v1 import router_internal_pb2, router_internal_pb2_grpc

from libs.current import Current
from libs.metering.prices import PriceBook
from libs.process import Process
from libs.routes import EMPTY, RouteTable
from libs.rpc.channel import open_channel
from libs.rpc.identity import mesh_identity
from libs.rpc.watch import SnapshotWatch
from libs.tls import TlsFiles


class Snapshots:
    """Watches routes and prices. The process becomes ready when both have arrived.

    Attributes:
        routes: returns the current routes; `EMPTY` until prices have arrived, too, since the cost
            of a request would be wrong without them.
        prices: returns the current prices.
    """

    def __init__(
        self,
        *,
        router_address: str,
        cost_address: str,
        running: Process,
        tls: TlsFiles | None = None,
    ) -> None:
        caller = mesh_identity(running.name).metadata()
        router = router_internal_pb2_grpc.RouterInternalServiceStub(
            open_channel(router_address, tls=tls, traced=False)
        )
        cost = cost_internal_pb2_grpc.CostInternalServiceStub(
            open_channel(cost_address, tls=tls, traced=False)
        )
        self.routes = Current(EMPTY)
        self.prices = Current(PriceBook())
        self._running = running
        self._newest_routes: RouteTable | None = None
        self._prices_known = False
        self._prepare_routes: Callable[[RouteTable], RouteTable] | None = None
        self._route_watch = SnapshotWatch(
            "router",
            open_stream=lambda: router.WatchRoutes(
                router_internal_pb2.WatchRoutesRequest(), metadata=caller
            ),
            on_snapshot=self._take_routes,
            clock=running.clock,
        )
        self._price_watch = SnapshotWatch(
            "cost",
            open_stream=lambda: cost.WatchPrices(
                cost_internal_pb2.WatchPricesRequest(), metadata=caller
            ),
            on_snapshot=self._take_prices,
            clock=running.clock,
        )

    def start(self, *, prepare_routes: Callable[[RouteTable], RouteTable] | None = None) -> None:
        """Starts the watches in the background.

        Args:
            prepare_routes: called with each new table; returns the table to use. An error rejects
                the snapshot.
        """
        self._prepare_routes = prepare_routes
        self._running.spawn(self._route_watch.run())
        self._running.spawn(self._price_watch.run())
        self._running.spawn(self._become_ready())

    def _take_routes(self, snapshot: router_internal_pb2.WatchRoutesResponse) -> None:
        newest = self._newest_routes
        if newest is not None and not newest.is_replaced_by(snapshot):
            return
        table = RouteTable.of(snapshot)
        if self._prices_known:
            self._use(table)  # if this raises, the same revision may come again
        self._newest_routes = table

    def _take_prices(self, snapshot: cost_internal_pb2.WatchPricesResponse) -> None:
        self.prices.replace(PriceBook(snapshot.prices))
        if self._prices_known:
            return
        self._prices_known = True
        if self._newest_routes is not None:
            self._use(self._newest_routes)

    def _use(self, routes: RouteTable) -> None:
        if self._prepare_routes is not None:
            routes = self._prepare_routes(routes)
        self.routes.replace(routes)

    async def _become_ready(self) -> None:
        await self._route_watch.wait_first()
        await self._price_watch.wait_first()
        await self._running.set_ready()
