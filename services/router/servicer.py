"""`RouterService`: translates, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.router.v1 import router_pb2, router_pb2_grpc

from libs.rpc.identity import Context
from services.router.snapshots import RouteSnapshots


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Explains single decisions and pushes all of them."""

    def __init__(self, snapshots: RouteSnapshots) -> None:
        self._snapshots = snapshots

    async def Route(
        self, request: router_pb2.RouteRequest, _context: Context
    ) -> router_pb2.RouteResponse:
        """Decides for one request."""
        choice = self._snapshots.table.choose(request.model, kind=None)
        return router_pb2.RouteResponse(
            target=choice.target, reason=choice.reason, revision=choice.revision
        )

    async def WatchRoutes(
        self, _request: router_pb2.WatchRoutesRequest, _context: Context
    ) -> AsyncIterator[router_pb2.WatchRoutesResponse]:
        """Streams the routes."""
        async for snapshot in self._snapshots.follow():
            yield snapshot
