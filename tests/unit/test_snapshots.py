"""Routes and prices in force: together, and unchanged by snapshots that are rejected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from headrace.cost.v1 import cost_internal_pb2, cost_pb2
from headrace.router.v1 import router_internal_pb2

from libs.clock import SystemClock
from libs.current import Current
from libs.routes import EMPTY, RouteTable
from libs.snapshots import Snapshots


def routes(revision: int, epoch: str = "one") -> router_internal_pb2.WatchRoutesResponse:
    return router_internal_pb2.WatchRoutesResponse(epoch=epoch, revision=revision)


PRICES = cost_internal_pb2.WatchPricesResponse(
    prices=[cost_pb2.Price(name="prices/1", model="smollm2")]
)


@pytest.fixture
async def snapshots() -> Snapshots:
    running = SimpleNamespace(
        name="inference", clock=SystemClock(), spawn=lambda work: work.close()
    )
    return Snapshots(
        router_address="127.0.0.1:1", cost_address="127.0.0.1:1", running=cast(Any, running)
    )


def test_readers_get_the_value_in_force():
    """They are given a callable, and never assigned to."""
    current = Current(1)
    assert current() == 1
    current.replace(2)
    assert current() == 2


@pytest.mark.parametrize("order", ["routes first", "prices first"])
async def test_routes_are_in_force_when_prices_are_known(order, snapshots):
    """Else the first requests would cost nothing."""
    if order == "routes first":
        snapshots._take_routes(routes(1))
        assert snapshots.routes() is EMPTY
        snapshots._take_prices(PRICES)
    else:
        snapshots._take_prices(PRICES)
        assert snapshots.routes() is EMPTY
        snapshots._take_routes(routes(1))
    assert snapshots.routes().revision == 1
    snapshots._take_routes(routes(2))
    assert snapshots.routes().revision == 2


async def test_a_table_that_is_refused_before_it_is_in_force_changes_nothing(snapshots):
    """The last good one stays."""

    def refuse(table: RouteTable) -> RouteTable:
        if table.revision == 2:
            raise ValueError("a poison snapshot")
        return table

    snapshots.start(prepare_routes=refuse)
    snapshots._take_prices(PRICES)
    snapshots._take_routes(routes(1))
    with pytest.raises(ValueError, match="poison"):
        snapshots._take_routes(routes(2))
    assert snapshots.routes().revision == 1
    snapshots._take_routes(routes(3))
    assert snapshots.routes().revision == 3


async def test_routes_of_another_epoch_or_a_higher_revision_replace_those_in_force(snapshots):
    """A router that restarts counts from 1; an older snapshot of one router comes too late."""
    snapshots._take_prices(PRICES)
    in_force = []
    for epoch, revision in [("one", 5), ("one", 4), ("one", 6), ("two", 1), ("two", 1), ("two", 2)]:
        snapshots._take_routes(routes(revision, epoch))
        in_force.append((snapshots.routes().epoch, snapshots.routes().revision))
    assert in_force == [("one", 5), ("one", 5), ("one", 6), ("two", 1), ("two", 1), ("two", 2)]
