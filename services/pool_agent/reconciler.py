"""Loads one version on Triton and keeps it loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import structlog
from prometheus_client import Histogram

from libs.clock import Clock
from libs.redaction import public_text
from services.pool_agent.archive import ArtifactRefused
from services.pool_agent.domain import Backoff, Report, State, Wanted
from services.pool_agent.download import Downloads
from services.pool_agent.repository import ModelRepository
from services.pool_agent.triton import ModelFailed, Triton, TritonAway

_log = structlog.get_logger()
_LOAD_SECONDS = Histogram(
    "headrace_pool_agent_load_duration_seconds",
    "From the start of loading a version to its first answer.",
    ["model"],
    buckets=(0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256),
)

_FAILURES = (ArtifactRefused, ModelFailed, TimeoutError, OSError, grpc.aio.AioRpcError)


@dataclass(frozen=True)
class ReconcileIntervals:
    """How often a reconciler checks its version, and how many failures it tolerates."""

    poll_seconds: float = 0.5
    poll_away_seconds: float = 0.1  # while Triton cannot be reached
    probe_seconds: float = 5.0
    silent_polls: int = 5  # a busy Triton answers late; after so many in a row it counts as away
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True)
class ReconcilerParts:
    """What all reconcilers share."""

    repository: ModelRepository
    downloads: Downloads
    triton: Triton
    clock: Clock
    intervals: ReconcileIntervals


class VersionReconciler:
    """One version. `lock` is held while its folder or its model on Triton changes."""

    def __init__(
        self,
        wanted: Wanted,
        parts: ReconcilerParts,
        *,
        lock: asyncio.Lock,
        report: Callable[[Report], None],
    ) -> None:
        self._wanted = wanted
        self._name = wanted.backend_model
        self._parts = parts
        self._lock = lock
        self._send_report = report
        self._verified = False
        self._away = False
        self._log = _log.bind(backend_model=self._name)

    async def run(self) -> None:
        """Keeps the version loaded until it is cancelled."""
        failures = 0
        while True:
            try:
                await self._bring_up(first_try=failures == 0)
                failures = 0
                await self._watch()
            except TritonAway as error:
                if not self._away:
                    self._log.warning("triton is away", error=str(error))
                self._away = True
                self._report(State.LOADING, "waiting for Triton")
                await self._parts.clock.sleep(self._parts.intervals.poll_away_seconds)
            except _FAILURES as error:
                failures += 1
                pause = self._parts.intervals.backoff.seconds(failures)
                self._log.error("loading failed", error=_text(error), retry_seconds=pause)
                self._report(State.FAILED, f"{_text(error)} (try {failures})")
                await self._parts.clock.sleep(pause)

    async def _bring_up(self, *, first_try: bool) -> None:
        """Returns when the version serves, and has been reported."""
        async with self._lock:
            installed = await self._is_installed()
            if installed and await self._parts.triton.is_ready(self._name):
                self._away = False
                self._report(State.READY)  # it has served while the agent was away
                return
            if first_try:
                self._report(State.LOADING, "" if installed else "fetching the artifact")
            started = self._parts.clock.monotonic_seconds()
            if not installed:
                await self._install()
            await self._load()
        seconds = self._parts.clock.monotonic_seconds() - started
        _LOAD_SECONDS.labels(self._wanted.model).observe(seconds)
        self._away = False
        self._log.info("ready", seconds=round(seconds, 3))
        self._report(State.READY)

    async def _is_installed(self) -> bool:
        """Returns whether the folder is as it was verified; reads it once in the agent's life."""
        if not self._verified:
            self._verified = await asyncio.to_thread(self._parts.repository.has, self._wanted)
        return self._verified

    async def _install(self) -> None:
        path = self._parts.repository.download_path(self._wanted)
        await self._parts.downloads.fetch(self._wanted.artifact_digest, path)
        await asyncio.to_thread(self._parts.repository.install, self._wanted, path)
        self._verified = True

    async def _load(self) -> None:
        triton = self._parts.triton
        if await triton.is_ready(self._name):  # what is loaded differs from the folder
            await triton.unload(self._name)
        await triton.load(self._name)
        await triton.warm(self._name, self._wanted.kind)

    async def _watch(self) -> None:
        """Returns when Triton does not have the version loaded any more.

        Raises:
            TritonAway: Triton cannot be reached.
            ModelFailed: the process of the version has died. It was unloaded, to be loaded again.
        """
        intervals, clock = self._parts.intervals, self._parts.clock
        silent = 0
        probe_at = clock.monotonic_seconds() + intervals.probe_seconds
        while True:
            await clock.sleep(intervals.poll_seconds)
            try:
                if not await self._parts.triton.is_ready(self._name):
                    return
                if clock.monotonic_seconds() >= probe_at:
                    await self._parts.triton.probe(self._name, self._wanted.kind)
                    probe_at = clock.monotonic_seconds() + intervals.probe_seconds
                silent = 0
            except TimeoutError as error:
                silent += 1
                if silent >= intervals.silent_polls:
                    raise TritonAway("Triton does not answer") from error
            except ModelFailed:
                await self._parts.triton.unload(self._name)
                raise

    def _report(self, state: State, message: str = "") -> None:
        digest = self._wanted.artifact_digest if self._verified else ""
        self._send_report(Report(self._name, state, digest, public_text(message)))


def _text(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"the registry: {error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
