"""Brings one Triton to what the registry asks for, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from prometheus_client import Gauge

from libs.clock import Clock
from libs.errors import HeadraceError
from libs.rpc.status import headrace_errors
from services.pool_agent.domain import (
    State,
    Status,
    Wanted,
    backend_model,
    backoff_seconds,
    wanted_by,
)
from services.pool_agent.repository import ModelRepository
from services.pool_agent.triton import TritonControl, TritonError

_log = structlog.get_logger()
_READY = Gauge("headrace_pool_agent_ready_models_count", "Versions that this Triton serves.")

# How late the restart of Triton may be seen.
POLL_SECONDS = 0.25

_STATES: Mapping[State, model_pb2.BackendState.ValueType] = {
    State.LOADING: model_pb2.BACKEND_STATE_LOADING,
    State.READY: model_pb2.BACKEND_STATE_READY,
    State.FAILED: model_pb2.BACKEND_STATE_FAILED,
}


class PoolAgent:
    """Compares wish and state each time either may have changed. Keeps nothing that it cannot see.

    Versions load side by side; one that fails is tried again, later and later.
    """

    def __init__(
        self,
        *,
        registry: registry_pb2_grpc.RegistryServiceAsyncStub,
        triton: TritonControl,
        repository: ModelRepository,
        backend_id: str,
        triton_address: str,
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._triton = triton
        self._repository = repository
        self._backend_id = backend_id
        self._triton_address = triton_address
        self._clock = clock
        self._deployments: list[registry_pb2.Deployment] | None = None
        self._statuses: dict[str, Status] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def take(self, snapshot: registry_pb2.WatchDeploymentsResponse) -> None:
        """Takes what the registry pushed: the wish, and what it believes of this Triton."""
        self._deployments = list(snapshot.deployments)
        self._changed.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        await asyncio.to_thread(self._repository.prepare)
        try:
            while True:
                self._changed.clear()
                if self._deployments is not None:
                    await self._reconcile(self._deployments)
                try:
                    await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
                except TimeoutError:
                    continue
        finally:
            for load in self._loads.values():
                load.cancel()
            await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _reconcile(self, deployments: list[registry_pb2.Deployment]) -> None:
        wanted = wanted_by(deployments)
        ready = await self._triton.ready_models()
        _READY.set(len(ready or ()))
        for name, want in wanted.items():
            if name in self._loads:
                continue
            if ready is not None and name in ready and self._repository.holds(name, want.digest):
                self._statuses[name] = Status(State.READY)
            elif self._statuses.get(name, Status(State.READY)).state is not State.FAILED:
                self._load(want, failures=0)
        for name in [*self._loads, *self._statuses]:
            if name not in wanted:
                self._forget(name)
        if ready is not None:
            await self._remove_unwanted(ready, wanted)
        await self._report(deployments)

    def _load(self, want: Wanted, *, failures: int) -> None:
        self._statuses[want.backend_model] = Status(State.LOADING)
        task = asyncio.create_task(self._load_until_done(want, failures))
        self._loads[want.backend_model] = task

    async def _load_until_done(self, want: Wanted, failures: int) -> None:
        """Loads one version, with pauses after failures, until it serves or is not wanted."""
        name = want.backend_model
        while True:
            try:
                await self._fetch(want)
                self._tell(name, Status(State.LOADING, "loading"))
                await self._triton.load(name)
                await self._triton.warm(want)
            except (TritonError, HeadraceError, OSError) as error:
                failures += 1
                _log.warning("load failed", model=name, failures=failures, error=str(error))
                away = await self._triton.ready_models() is None
                if away:
                    self._tell(name, Status(State.LOADING, "waiting for Triton"))
                    await self._clock.sleep(POLL_SECONDS)
                else:
                    self._tell(name, Status(State.FAILED, str(error)))
                    await self._clock.sleep(backoff_seconds(failures))
            else:
                _log.info("loaded", model=name, artifact_digest=want.digest)
                self._loads.pop(name, None)
                self._tell(name, Status(State.READY))
                return

    async def _fetch(self, want: Wanted) -> None:
        name = want.backend_model
        if await asyncio.to_thread(self._repository.holds, name, want.digest):
            return
        self._tell(name, Status(State.LOADING, "fetching the artifact"))
        with self._repository.incoming() as incoming, headrace_errors():
            request = registry_pb2.DownloadArtifactRequest(digest=want.digest)
            async for part in self._registry.DownloadArtifact(request):
                await asyncio.to_thread(incoming.write, part.chunk)
            await asyncio.to_thread(incoming.install, name, want.digest)

    def _forget(self, name: str) -> None:
        load = self._loads.pop(name, None)
        if load is not None:
            load.cancel()
        self._statuses.pop(name, None)

    async def _remove_unwanted(self, ready: frozenset[str], wanted: Mapping[str, Wanted]) -> None:
        on_disk = await asyncio.to_thread(self._repository.names)
        for name in {*ready, *on_disk} - wanted.keys():
            try:
                await self._triton.unload(name)
            except TritonError as error:
                _log.warning("unload failed", model=name, error=str(error))
                continue
            # Its stub has the files open and ends by itself.
            await asyncio.to_thread(self._repository.remove, name)
            _log.info("unloaded", model=name)

    def _tell(self, name: str, status: Status) -> None:
        self._statuses[name] = status
        self._changed.set()

    async def _report(self, deployments: list[registry_pb2.Deployment]) -> None:
        """Corrects what the registry believes of this Triton, where it is wrong."""
        for deployment in deployments:
            status = self._statuses.get(backend_model(deployment))
            if deployment.HasField("provider") or status is None:
                continue
            backend = self._backend(deployment, status)
            if backend in deployment.backends:
                continue
            try:
                with headrace_errors():
                    await self._registry.ReportBackend(
                        registry_pb2.ReportBackendRequest(
                            deployment=deployment.name, backend=backend
                        )
                    )
            except HeadraceError as error:
                _log.warning("report failed", deployment=deployment.name, error=error.message)

    def _backend(self, deployment: registry_pb2.Deployment, status: Status) -> model_pb2.Backend:
        return model_pb2.Backend(
            id=self._backend_id,
            address=self._triton_address,
            backend_model=backend_model(deployment),
            state=_STATES[status.state],
            artifact_digest=deployment.artifact_digest if status.state is State.READY else "",
            message=status.message,
            kind=model_pb2.BACKEND_KIND_TRITON,
        )
