"""Reports the state of each deployment to the registry, until the registry has it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import grpc
import structlog

from libs.clock import Clock
from services.pool_agent.domain import Backoff, Report

_log = structlog.get_logger()

Send = Callable[[str, Report], Awaitable[None]]

_BACKOFF = Backoff(first_seconds=0.2, max_seconds=2.0)
# The registry will refuse these however often they are sent.
_REFUSALS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)


class Reporter:
    """Compares the current reports with those that the registry has, and sends the differences."""

    def __init__(self, send: Send, clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._current: dict[str, Report] = {}
        self._received: dict[str, Report] = {}
        self._changed = asyncio.Event()

    def report(self, deployment: str, report: Report) -> None:
        """Sets the current report of a deployment."""
        self._current[deployment] = report
        self._changed.set()

    def forget(self, deployment: str) -> None:
        """Stops reporting a deployment, until there is another report of it."""
        self._current.pop(deployment, None)

    def received(self, reports: Mapping[str, Report]) -> None:
        """Replaces the reports that the registry has, as it says itself."""
        self._received = dict(reports)
        self._changed.set()

    async def run(self) -> None:
        """Sends until it is cancelled."""
        failures = 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            if await self._send_differences():
                failures = 0
            else:
                failures += 1
                await self._clock.sleep(_BACKOFF.seconds(failures))
                self._changed.set()

    async def _send_differences(self) -> bool:
        """Returns whether the registry has received or refused all reports."""
        for deployment, report in list(self._current.items()):
            if self._received.get(deployment) == report:
                continue
            try:
                await self._send(deployment, report)
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    "report not accepted",
                    deployment=deployment,
                    state=report.state.value,
                    code=error.code().name,
                    details=error.details(),
                )
                if error.code() not in _REFUSALS:
                    return False
            self._received[deployment] = report
        return True
