"""`RouterService`: translates, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.router.v1 import router_pb2, router_pb2_grpc
from typing_extensions import override

from libs.rpc.identity import Context
from services.router.snapshots import RouteSnapshots


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Explains single decisions and pushes all of them."""

    def __init__(self, snapshots: RouteSnapshots) -> None:
        self._snapshots = snapshots

    @override
    async def Route(
        self, request: router_pb2.RouteRequest, context: Context
    ) -> router_pb2.RouteResponse:
        """Decides for one request."""
        choice = self._snapshots.table().choose(request.model, kind=None)
        return router_pb2.RouteResponse(
            target=choice.target, reason=choice.reason, revision=choice.revision
        )

    @override
    async def WatchRoutes(
        self, request: router_pb2.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[router_pb2.WatchRoutesResponse]:
        """Streams the routes."""
        async for snapshot in self._snapshots.follow():
            yield snapshot
