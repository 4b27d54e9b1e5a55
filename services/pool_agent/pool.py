"""All versions of the pool on this Triton server: nothing else stays loaded."""

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
    """Makes loaded what is wanted, and unloads the rest."""

    def __init__(self, parts: ReconcilerParts, reporter: Reporter) -> None:
        self._parts = parts
        self._reporter = reporter
        self._deployments: Mapping[str, Wanted] = {}
        self._reports: dict[str, Report] = {}
        # By deployment: the version before an update, which stays loaded until the new one is.
        self._replaced: dict[str, str] = {}
        self._reconcilers: dict[str, asyncio.Task[None]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = asyncio.Event()

    def want(self, deployments: Mapping[str, Wanted]) -> None:
        """Replaces what each deployment of the pool wants."""
        self._note_replaced(deployments)
        self._deployments = deployments
        wanted = {each.backend_model: each for each in deployments.values()}
        for name in self._reconcilers.keys() - wanted.keys():
            self._reconcilers.pop(name).cancel()
            self._reports.pop(name, None)
        for name in wanted.keys() - self._reconcilers.keys():
            reconciler = VersionReconciler(
                wanted[name], self._parts, lock=self._locks[name], report=self._take
            )
            self._reconcilers[name] = asyncio.create_task(reconciler.run(), name=name)
        for deployment, each in deployments.items():
            if each.backend_model in self._reports:
                self._reporter.report(deployment, self._reports[each.backend_model])
        self._settle_replaced()
        self._count()
        self._changed.set()

    async def run(self) -> None:
        """Unloads and removes whatever is not wanted, until it is cancelled.

        It starts with the first snapshot: until then it is not known what is wanted.
        """
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._sweep()
                try:
                    await asyncio.wait_for(self._wait_for_change(), SWEEP_SECONDS)
                except TimeoutError:
                    self._changed.set()
        finally:
            for reconciler in self._reconcilers.values():
                reconciler.cancel()
            await asyncio.gather(*self._reconcilers.values(), return_exceptions=True)

    def _note_replaced(self, deployments: Mapping[str, Wanted]) -> None:
        for deployment, before in self._deployments.items():
            now = deployments.get(deployment)
            if now == before:
                continue
            # Its last report is about a version that it does not have any more.
            self._reporter.forget(deployment)
            if now is None:
                self._replaced.pop(deployment, None)
            elif self._is(State.READY, before.backend_model):
                self._replaced[deployment] = before.backend_model

    def _settle_replaced(self) -> None:
        """Gives up the versions before updates whose new version is ready or has failed.

        After a failure, too: the old version may have the memory that the new one lacks.
        """
        for deployment in list(self._replaced):
            name = self._deployments[deployment].backend_model
            if self._is(State.READY, name) or self._is(State.FAILED, name):
                del self._replaced[deployment]
                self._changed.set()

    def _is(self, state: State, backend_model: str) -> bool:
        report = self._reports.get(backend_model)
        return report is not None and report.state is state

    async def _wait_for_change(self) -> None:
        """Returns with the next change.

        Raises:
            Exception: a reconciler has ended, which is a bug.
        """
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            ended, _ = await asyncio.wait(
                {changed, *self._reconcilers.values()}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended.intersection(self._reconcilers.values()):  # `want` has not ended it
                task.result()
                raise RuntimeError(f"the reconciler of {task.get_name()} has ended")
        finally:
            changed.cancel()

    async def _sweep(self) -> None:
        repository, triton = self._parts.repository, self._parts.triton
        try:
            loaded = await triton.loaded()
        except (TritonAway, ModelFailed, TimeoutError):
            loaded = frozenset()
        names = await asyncio.to_thread(repository.names)
        for name in (loaded | names) - self._needed():
            async with self._locks[name]:
                await self._retire(name, loaded=name in loaded)

    def _needed(self) -> frozenset[str]:
        return frozenset(self._reconcilers) | frozenset(self._replaced.values())

    async def _retire(self, name: str, *, loaded: bool) -> None:
        if name in self._needed():  # it is wanted again
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
                self._reporter.report(deployment, report)
        self._settle_replaced()
        self._count()

    def _count(self) -> None:
        for state in State:
            count = sum(report.state is state for report in self._reports.values())
            _VERSIONS.labels(state.value).set(count)
