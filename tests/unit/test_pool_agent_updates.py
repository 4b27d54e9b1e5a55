"""What is loaded while deployments change their versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from libs.clock import SystemClock
from services.pool_agent.domain import Backoff, Kind, Report, State, Wanted
from services.pool_agent.pool import Pool
from services.pool_agent.reconciler import ReconcileIntervals, ReconcilerParts
from services.pool_agent.reporter import Reporter
from services.pool_agent.triton import ModelFailed

DIGEST = "sha256:" + "0123456789abcdef" * 4
OLD, NEW, NEWER = (Wanted("m", f"{n}.0.0", DIGEST, Kind.CHAT) for n in (1, 2, 3))


class Triton:
    """Loads what it may, as soon as it may."""

    def __init__(self) -> None:
        self.models: set[str] = set()
        self.log: list[str] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.limit = 10

    async def is_ready(self, name: str) -> bool:
        return name in self.models

    async def loaded(self) -> frozenset[str]:
        return frozenset(self.models)

    async def load(self, name: str) -> None:
        await self.may_load.wait()
        if len(self.models) >= self.limit:
            raise ModelFailed("out of memory")
        self.models.add(name)
        self.log.append(f"load {name[:7]}")

    async def unload(self, name: str) -> None:
        self.models.discard(name)
        self.log.append(f"unload {name[:7]}")

    async def warm(self, name: str, kind: Kind) -> None:
        assert name in self.models

    async def probe(self, name: str, kind: Kind) -> None:
        assert name in self.models


class Repository:
    """Has every version."""

    def has(self, wanted: Wanted) -> bool:
        return True

    def names(self) -> frozenset[str]:
        return frozenset()

    def remove(self, backend_model: str) -> None:
        pass

    def download_path(self, wanted: Wanted) -> Path:
        raise NotImplementedError


class Mesh:
    """A pool with its Triton, and the reports that the registry has received."""

    def __init__(self) -> None:
        self.triton = Triton()
        self.reports: list[tuple[str, str, State]] = []
        parts: Any = ReconcilerParts(
            repository=Repository(),  # type: ignore[arg-type]  # a double
            downloads=None,  # type: ignore[arg-type]  # nothing is fetched
            triton=self.triton,  # type: ignore[arg-type]  # a double
            clock=SystemClock(),
            intervals=ReconcileIntervals(
                poll_seconds=0.01, backoff=Backoff(first_seconds=0.01, max_seconds=0.01)
            ),
        )
        self.reporter = Reporter(self._send, SystemClock())
        self.pool = Pool(parts, self.reporter)

    async def _send(self, deployment: str, report: Report) -> None:
        self.reports.append((deployment, report.backend_model[:7], report.state))

    def want(self, **deployments: Wanted) -> None:
        """Takes a snapshot of a registry that has no reports of these versions yet."""
        self.reporter.received({})
        self.pool.want(deployments)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not holds():  # noqa: ASYNC110  # the doubles have no events
                await asyncio.sleep(0.005)

    async def reported(self, deployment: str, version: Wanted, state: State) -> None:
        entry = (deployment, version.backend_model[:7], state)
        await self.until(lambda: entry in self.reports)

    def loads(self, *versions: Wanted) -> bool:
        return self.triton.models == {version.backend_model for version in versions}


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    running = [asyncio.create_task(made.pool.run()), asyncio.create_task(made.reporter.run())]
    made.want(d=OLD)
    await made.reported("d", OLD, State.READY)
    yield made
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_the_old_version_stays_loaded_until_the_new_one_is_ready(mesh):
    """Running streams of the old version can end, and an update back needs no loading."""
    mesh.triton.may_load.clear()
    mesh.want(d=NEW)
    await mesh.reported("d", NEW, State.LOADING)
    await asyncio.sleep(0.05)
    assert mesh.loads(OLD)
    mesh.triton.may_load.set()
    await mesh.until(lambda: mesh.loads(NEW))
    assert mesh.triton.log == ["load m-1.0.0", "load m-2.0.0", "unload m-1.0.0"]


async def test_the_old_version_makes_room_where_both_do_not_fit(mesh):
    """The new one fails once, and is loaded after the old one is unloaded."""
    mesh.triton.limit = 1
    mesh.want(d=NEW)
    await mesh.reported("d", NEW, State.READY)
    assert ("d", "m-2.0.0", State.FAILED) in mesh.reports
    assert mesh.loads(NEW)


async def test_a_second_update_keeps_the_version_that_serves(mesh):
    """Not the one between, which was never ready."""
    mesh.triton.may_load.clear()
    mesh.want(d=NEW)
    mesh.want(d=NEWER)
    await asyncio.sleep(0.05)
    assert mesh.loads(OLD)
    mesh.triton.may_load.set()
    await mesh.until(lambda: mesh.loads(NEWER))


async def test_an_update_back_serves_at_once(mesh):
    """The old version was not unloaded."""
    mesh.triton.may_load.clear()
    mesh.want(d=NEW)
    mesh.reports.clear()
    mesh.want(d=OLD)
    await mesh.reported("d", OLD, State.READY)
    assert mesh.triton.log == ["load m-1.0.0"]


async def test_nothing_is_reported_of_the_old_version_after_an_update(mesh):
    """The registry has forgotten its reports, and would take one for the new version."""
    mesh.triton.may_load.clear()
    mesh.reports.clear()
    mesh.want(d=NEW)
    await mesh.reported("d", NEW, State.LOADING)
    assert [entry for entry in mesh.reports if entry[1] == OLD.backend_model[:7]] == []


async def test_a_deleted_deployment_keeps_nothing(mesh):
    """Also in the middle of an update."""
    mesh.triton.may_load.clear()
    mesh.want(d=NEW)
    mesh.want()
    await mesh.until(lambda: not mesh.triton.models)


async def test_a_version_that_another_deployment_wants_stays(mesh):
    """An update of one deployment does not disturb another."""
    mesh.want(d=OLD, e=OLD)
    await mesh.reported("e", OLD, State.READY)
    mesh.want(d=NEW, e=OLD)
    await mesh.until(lambda: mesh.loads(OLD, NEW))
    await asyncio.sleep(0.05)
    assert mesh.triton.log == ["load m-1.0.0", "load m-2.0.0"]
