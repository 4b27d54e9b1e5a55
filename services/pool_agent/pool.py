"""All versions of the pool on this Triton: a keeper for each, and nothing else stays."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

import structlog
from prometheus_client import Gauge

from services.pool_agent.domain import Report, State, Wanted
from services.pool_agent.reconciler import ReconcilerParts, VersionReconciler
from services.pool_agent.reporter import Reporter
from services.pool_agent.triton import ModelFailed, TritonAway

_log = structlog.get_logger()
_VERSIONS = Gauge("headrace_pool_agent_versions", "Versions by their state here.", ["state"])

SWEEP_SECONDS = 5.0


class Pool:
    """Turns what is wanted into what is loaded."""

    def __init__(self, parts: ReconcilerParts, reporter: Reporter) -> None:
        self._parts = parts
        self._reporter = reporter
        self._deployments: Mapping[str, Wanted] = {}
        self._reports: dict[str, Report] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = asyncio.Event()

    def want(self, deployments: Mapping[str, Wanted]) -> None:
        """Takes what each deployment of the pool asks for; replaces what was before."""
        for gone in self._deployments.keys() - deployments.keys():
            self._reporter.forget(gone)
        self._deployments = deployments
        wanted = {each.backend_model: each for each in deployments.values()}
        for name in self._keepers.keys() - wanted.keys():
            self._keepers.pop(name).cancel()
            self._reports.pop(name, None)
        for name in wanted.keys() - self._keepers.keys():
            keeper = VersionReconciler(
                wanted[name], self._parts, lock=self._locks[name], tell=self._take
            )
            self._keepers[name] = asyncio.create_task(keeper.run(), name=name)
        for deployment, each in deployments.items():
            if each.backend_model in self._reports:
                self._reporter.tell(deployment, self._reports[each.backend_model])
        self._count()
        self._changed.set()

    async def run(self) -> None:
        """Unloads and removes whatever is not wanted, until it is cancelled.

        It begins with the first snapshot: without one, nobody knows what is wanted.
        """
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._sweep()
                try:
                    await asyncio.wait_for(self._wait_for_trouble(), SWEEP_SECONDS)
                except TimeoutError:
                    self._changed.set()
        finally:
            for keeper in self._keepers.values():
                keeper.cancel()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    async def _wait_for_trouble(self) -> None:
        """Returns with the next change.

        Raises:
            Exception: a reconciler ended, which it never should.
        """
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            ended, _ = await asyncio.wait(
                {changed, *self._keepers.values()}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended.intersection(self._keepers.values()):  # not those that `want` ended
                task.result()
                raise RuntimeError(f"the reconciler of {task.get_name()} ended")
        finally:
            changed.cancel()

    async def _sweep(self) -> None:
        repository, triton = self._parts.repository, self._parts.triton
        try:
            loaded = await triton.loaded()
        except (TritonAway, ModelFailed, TimeoutError):
            loaded = frozenset()
        names = await asyncio.to_thread(repository.names)
        for name in (loaded | names) - self._keepers.keys():
            async with self._locks[name]:
                await self._retire(name, loaded=name in loaded)

    async def _retire(self, name: str, *, loaded: bool) -> None:
        if name in self._keepers:  # it is wanted again
            return
        try:
            if loaded or await self._parts.triton.is_ready(name):
                await self._parts.triton.unload(name)
        except TritonAway:
            pass  # and has nothing loaded when it comes back
        except (ModelFailed, TimeoutError) as error:
            _log.warning("a version cannot be unloaded", backend_model=name, error=str(error))
            return
        await asyncio.to_thread(self._parts.repository.remove, name)
        _log.info("removed", backend_model=name)

    def _take(self, report: Report) -> None:
        self._reports[report.backend_model] = report
        for deployment, wanted in self._deployments.items():
            if wanted.backend_model == report.backend_model:
                self._reporter.tell(deployment, report)
        self._count()

    def _count(self) -> None:
        for state in State:
            count = sum(report.state is state for report in self._reports.values())
            _VERSIONS.labels(state.value).set(count)
