"""Bills what a cancelled job has used.

Inference records the usage of a job when its answer is complete, and nothing of an attempt that
ends early: the next attempt would be billed as well. Only the worker knows that a cancelled job has
no next attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from headrace.common.v1 import usage_pb2
from headrace.events.v1 import events_pb2
from prometheus_client import Counter

from libs.errors import HeadraceError
from libs.metering.usage import UsageRecorder
from libs.model_reference import parse_version_name
from services.worker.execution import Progress
from services.worker.identity import identity_of_job

_log = structlog.get_logger()

_FAILURES = Counter(
    "headrace_worker_unbilled_jobs", "Cancelled jobs whose usage could not be recorded."
)

# Prices are missing only until `cost` has answered for the first time.
PRICES_TIMEOUT_SECONDS = 30.0


class CancelledUsage:
    """Records the usage of cancelled jobs."""

    def __init__(
        self, recorder: UsageRecorder, *, wait_for_prices: Callable[[], Awaitable[object]]
    ) -> None:
        self._recorder = recorder
        self._wait_for_prices = wait_for_prices

    async def record(self, job: events_pb2.JobSubmitted, progress: Progress) -> None:
        """Records the tokens that the job's last attempt got, if any.

        As with every answer that ends early, the tokens of the prompt are unknown and free. If the
        usage cannot be recorded, that is logged and counted.
        """
        if not progress.token_count:
            return
        try:
            async with asyncio.timeout(PRICES_TIMEOUT_SECONDS):
                await self._wait_for_prices()
            await self._recorder.record(
                request_id=progress.request_id,
                identity=identity_of_job(job),
                model=parse_version_name(progress.model_version)[0],
                model_version=progress.model_version,
                usage=usage_pb2.TokenUsage(completion_tokens=progress.token_count),
                operation="generate",
            )
        except (HeadraceError, TimeoutError) as error:
            _FAILURES.inc()
            _log.error(
                "usage of a cancelled job was not recorded",
                job_id=job.job_id,
                token_count=progress.token_count,
                error=error,
            )
