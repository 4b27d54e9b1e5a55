"""The routes as they are now, for whoever watches them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.registry.v1 import registry_pb2
from headrace.router.v1 import router_pb2

from libs.routes import EMPTY, RouteTable
from libs.rpc.latest import Latest
from services.router.domain import routes_of


class RouteSnapshots:
    """Turns each snapshot of the registry into one of routes, where it changes any.

    Attributes:
        table: decides for single requests, as every reader of the snapshots does.
    """

    def __init__(self) -> None:
        self.table: RouteTable = EMPTY
        self._latest = Latest[router_pb2.WatchRoutesResponse]()

    def take(self, deployments: registry_pb2.WatchDeploymentsResponse) -> None:
        """Takes what the registry pushed."""
        routes = routes_of(deployments.deployments)
        known = self._latest.value
        if known is not None and list(known.routes) == routes:
            return
        revision = 1 if known is None else known.revision + 1
        snapshot = router_pb2.WatchRoutesResponse(revision=revision, routes=routes)
        self.table = RouteTable.of(snapshot)
        self._latest.publish(snapshot)

    def follow(self) -> AsyncIterator[router_pb2.WatchRoutesResponse]:
        """Yields the snapshot at once, where there is one, and each newer one."""
        return self._latest.follow()

    def close(self) -> None:
        """Ends all watches."""
        self._latest.close()
