"""Sends the deployments to the services that watch them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from headrace.registry.v1.registry_internal_pb2 import WatchDeploymentsResponse

from libs.errors import Unavailable
from libs.rpc.latest import Latest
from services.registry.domain import Snapshot
from services.registry.metrics import DEPLOYMENTS_REVISION, FEED_FAILURES, WATCHES_OPEN
from services.registry.store import RegistryStore
from services.registry.wire import snapshot_to_proto

_log = structlog.get_logger()

# The longest time until a change by another replica, on the same database, is seen.
POLL_SECONDS = 1.0


class DeploymentFeed:
    """Reads the deployments once for all watches, whenever they change."""

    def __init__(self, store: RegistryStore) -> None:
        self._store = store
        self._latest = Latest[Snapshot]()
        self._changed = asyncio.Event()
        self._refreshing = asyncio.Lock()

    def changed(self) -> None:
        """Makes `run` look for changes now: this process has made one."""
        self._changed.set()

    async def run(self) -> None:
        """Looks for changes until it is cancelled; an unavailable database shows none."""
        while True:
            self._changed.clear()
            await self._try_refresh()
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Reads the deployments if their revision is another one than the last that was read.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._refreshing:  # one at a time, so that no older state replaces a newer one
            known = self._latest.value
            if known is None or await self._store.revision() != known.revision:
                newest = await self._store.deployments_snapshot()
                DEPLOYMENTS_REVISION.set(newest.revision)
                self._latest.publish(newest)

    async def watch(self, pool: str) -> AsyncIterator[WatchDeploymentsResponse]:
        """Yields the deployments of a pool immediately, and again when one of them has changed.

        The first snapshot is read now, so that a caller sees its own changes in it; while the
        database is unavailable, it is the last one that was read.
        """
        await self._try_refresh()
        sent = None
        with WATCHES_OPEN.track_inprogress():
            async for snapshot in self._latest.follow():
                deployments = snapshot.of_pool(pool)
                if deployments != sent:
                    sent = deployments
                    yield snapshot_to_proto(snapshot, pool)

    def close(self) -> None:
        """Ends all watches."""
        self._latest.close()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except Unavailable as error:
            _log.warning("deployments cannot be read", error=error.message)
        except Exception:  # noqa: BLE001  # whatever it is, the next read may succeed
            # Such as a row that cannot be parsed: watchers keep the last good snapshot.
            FEED_FAILURES.inc()
            _log.exception("deployments cannot be read")
