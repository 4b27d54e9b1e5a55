"""The prices in force, for the usage that the worker itself records."""

from __future__ import annotations

import grpc
from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc

from libs.clock import Clock
from libs.metering.prices import PriceBook
from libs.rpc.identity import mesh_identity
from libs.rpc.watch import SnapshotWatch

_CALLER = mesh_identity("worker").metadata()


class Prices:
    """Watches the prices that `cost` pushes."""

    def __init__(self, channel: grpc.aio.Channel, clock: Clock) -> None:
        stub: cost_internal_pb2_grpc.CostInternalServiceAsyncStub = (
            cost_internal_pb2_grpc.CostInternalServiceStub(channel)
        )
        self._book = PriceBook()
        self._watch = SnapshotWatch(
            "cost",
            open_stream=lambda: stub.WatchPrices(
                cost_internal_pb2.WatchPricesRequest(), metadata=_CALLER
            ),
            on_snapshot=self._replace,
            clock=clock,
        )

    def current(self) -> PriceBook:
        """Returns the prices in force; none before `wait_known` has returned."""
        return self._book

    async def run(self) -> None:
        """Watches until it is cancelled."""
        await self._watch.run()

    async def wait_known(self) -> None:
        """Returns when prices are known."""
        await self._watch.wait_first()

    def _replace(self, snapshot: cost_internal_pb2.WatchPricesResponse) -> None:
        self._book = PriceBook(snapshot.prices)
