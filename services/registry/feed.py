"""Pushes the deployments to whoever watches them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from headrace.registry.v1 import registry_pb2

from libs.errors import Unavailable
from libs.rpc.latest import Latest
from services.registry.domain import Snapshot
from services.registry.metrics import DEPLOYMENTS_REVISION, FEED_FAILURES, WATCHES_OPEN
from services.registry.store import RegistryStore
from services.registry.wire import snapshot_to_proto

_log = structlog.get_logger()

# How late a change made by another replica, on the same database, may be seen.
POLL_SECONDS = 1.0


class DeploymentFeed:
    """Reads the deployments once for all watchers, whenever they change."""

    def __init__(self, store: RegistryStore) -> None:
        self._store = store
        self._latest = Latest[Snapshot]()
        self._changed = asyncio.Event()
        self._refreshing = asyncio.Lock()

    def changed(self) -> None:
        """Says that this process changed something: it is pushed now, not at the next poll."""
        self._changed.set()

    async def run(self) -> None:
        """Looks for changes until it is cancelled; while the database is away there are none."""
        while True:
            self._changed.clear()
            await self._try_refresh()
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Reads the deployments, if there is a revision that is not known yet.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._refreshing:  # in turn, so that no older state follows a newer one
            known = self._latest.value
            if known is None or await self._store.revision() != known.revision:
                newest = await self._store.deployments_snapshot()
                DEPLOYMENTS_REVISION.set(newest.revision)
                self._latest.publish(newest)

    async def watch(self, pool: str) -> AsyncIterator[registry_pb2.WatchDeploymentsResponse]:
        """Yields the deployments of a pool at once, and again when one of them changed.

        Begins with what holds now, so that who changed something and then watches sees it; while
        the database is away, with what was known last.
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
