"""Tells the registry the state of each deployment here, until it has heard it."""

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
# The registry will not take these however often they are sent.
_REFUSALS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)


class Reporter:
    """Compares what is so with what the registry has heard, and sends the difference."""

    def __init__(self, send: Send, clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._wanted: dict[str, Report] = {}
        self._heard: dict[str, Report] = {}
        self._changed = asyncio.Event()

    def tell(self, deployment: str, report: Report) -> None:
        """Sets what the registry is to hear of a deployment."""
        self._wanted[deployment] = report
        self._changed.set()

    def forget(self, deployment: str) -> None:
        """There is nothing more to say of a deployment."""
        self._wanted.pop(deployment, None)

    def heard(self, reports: Mapping[str, Report]) -> None:
        """Takes what the registry says that it has heard."""
        self._heard = dict(reports)
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
        """Returns whether all is said."""
        for deployment, report in list(self._wanted.items()):
            if self._heard.get(deployment) == report:
                continue
            try:
                await self._send(deployment, report)
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    "the registry does not take a report",
                    deployment=deployment,
                    state=report.state.value,
                    code=error.code().name,
                    details=error.details(),
                )
                if error.code() not in _REFUSALS:
                    return False
            self._heard[deployment] = report
        return True
