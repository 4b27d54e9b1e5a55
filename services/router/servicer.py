"""`RouterService` explains decisions, `RouterInternalService` sends all routes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from headrace.router.v1 import (
    router_internal_pb2,
    router_internal_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from typing_extensions import override

from libs.rpc.identity import Context
from services.router.snapshots import RouteSnapshots


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Decides for single requests, without running them."""

    def __init__(self, snapshots: RouteSnapshots) -> None:
        self._snapshots = snapshots

    @override
    async def Route(
        self, request: router_pb2.RouteRequest, context: Context
    ) -> router_pb2.RouteResponse:
        choice = self._snapshots.table().choose(request.model, kind=None)
        target = choice.target
        return router_pb2.RouteResponse(
            route=choice.decision(),
            model_version=target.model_version,
            artifact_digest=target.artifact_digest,
            schema=target.schema,
            backends=[backend.status for backend in target.backends],
        )


class RouterInternalServicer(router_internal_pb2_grpc.RouterInternalServiceServicer):
    """Sends the routes to the services that take requests."""

    def __init__(self, snapshots: RouteSnapshots) -> None:
        self._snapshots = snapshots

    @override
    async def WatchRoutes(
        self, request: router_internal_pb2.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[router_internal_pb2.WatchRoutesResponse]:
        async for snapshot in self._snapshots.follow():
            yield snapshot
