"""The newest routes, for single decisions and for watches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from headrace.registry.v1.registry_internal_pb2 import WatchDeploymentsResponse
from headrace.router.v1.router_internal_pb2 import ModelRoute, WatchRoutesResponse

from libs.errors import Unavailable
from libs.routes import NOT_READY_RETRY_SECONDS, RouteTable
from libs.rpc.latest import Latest
from services.router.metrics import REVISION, TARGETS
from services.router.wire import routes_from_proto, without_report_times


class RouteSnapshots:
    """Makes a snapshot of routes from each snapshot of the registry that changes a route."""

    def __init__(self, epoch: str) -> None:
        """Starts without routes.

        Args:
            epoch: identifies this process: revisions are counted in it, and lost with it.
        """
        self._epoch = epoch
        self._table: RouteTable | None = None
        self._comparable: list[ModelRoute] = []
        self._latest = Latest[WatchRoutesResponse]()

    def table(self) -> RouteTable:
        """Returns the table that decides, the same as in every service that watches the routes.

        Raises:
            Unavailable: the registry has not sent any deployments yet.
        """
        if self._table is None:
            raise Unavailable(
                "the registry has not sent any deployments yet",
                reason="DEPENDENCY_UNAVAILABLE",
                metadata={"dependency": "registry"},
                retry_after_seconds=NOT_READY_RETRY_SECONDS,
            )
        return self._table

    def take(self, deployments: WatchDeploymentsResponse) -> None:
        """Replaces the routes with those of a snapshot of the registry."""
        routes = routes_from_proto(deployments.deployments)
        comparable = without_report_times(routes)
        known = self._latest.value
        if known is not None and comparable == self._comparable:
            return
        self._comparable = comparable
        revision = 1 if known is None else known.revision + 1
        snapshot = WatchRoutesResponse(epoch=self._epoch, revision=revision, routes=routes)
        self._table = RouteTable.of(snapshot)
        self._latest.publish(snapshot)
        REVISION.set(revision)
        TARGETS.labels("ready").set(_count(routes, ready=True))
        TARGETS.labels("not_ready").set(_count(routes, ready=False))

    def follow(self) -> AsyncIterator[WatchRoutesResponse]:
        """Yields the newest snapshot immediately, if there is one, and each newer one."""
        return self._latest.follow()

    def close(self) -> None:
        """Ends all watches."""
        self._latest.close()


def _count(routes: Iterable[ModelRoute], *, ready: bool) -> int:
    return sum(bool(target.backends) is ready for route in routes for target in route.targets)
