"""The routes as they are now, for whoever watches them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from headrace.registry.v1 import registry_pb2
from headrace.router.v1 import router_pb2
from prometheus_client import Gauge

from libs.errors import Unavailable
from libs.routes import NOT_READY_RETRY_SECONDS, RouteTable
from libs.rpc.latest import Latest
from services.router.domain import routes_of

_REVISION = Gauge("headrace_router_snapshot_revision", "The newest snapshot of routes.")
_TARGETS = Gauge("headrace_router_targets", "Deployments that are routed to.", ["state"])


class RouteSnapshots:
    """Turns each snapshot of the registry into one of routes, where it changes any."""

    def __init__(self) -> None:
        self._table: RouteTable | None = None
        self._latest = Latest[router_pb2.WatchRoutesResponse]()

    def table(self) -> RouteTable:
        """Returns what decides for single requests, as it does for every reader of the snapshots.

        Raises:
            Unavailable: the registry was not heard yet.
        """
        if self._table is None:
            raise Unavailable(
                "the registry was not heard yet",
                reason="DEPENDENCY_UNAVAILABLE",
                metadata={"dependency": "registry"},
                retry_after_seconds=NOT_READY_RETRY_SECONDS,
            )
        return self._table

    def take(self, deployments: registry_pb2.WatchDeploymentsResponse) -> None:
        """Takes what the registry pushed; where it raises, the routes stay as they were."""
        routes = routes_of(deployments.deployments)
        known = self._latest.value
        if known is not None and list(known.routes) == routes:
            return
        revision = 1 if known is None else known.revision + 1
        snapshot = router_pb2.WatchRoutesResponse(revision=revision, routes=routes)
        self._table = RouteTable.of(snapshot)
        self._latest.publish(snapshot)
        _REVISION.set(revision)
        _TARGETS.labels("ready").set(_count(routes, ready=True))
        _TARGETS.labels("not_ready").set(_count(routes, ready=False))

    def follow(self) -> AsyncIterator[router_pb2.WatchRoutesResponse]:
        """Yields the snapshot at once, where there is one, and each newer one."""
        return self._latest.follow()

    def close(self) -> None:
        """Ends all watches."""
        self._latest.close()


def _count(routes: Iterable[router_pb2.ModelRoute], *, ready: bool) -> int:
    return sum(bool(target.backends) is ready for route in routes for target in route.targets)
