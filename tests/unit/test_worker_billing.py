"""Cancelled jobs are billed what they used, under an id that no other job has."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.events.v1.events_pb2 import Identity, JobSubmitted
from prometheus_client import REGISTRY

from libs.errors import Unavailable
from services.worker import billing
from services.worker.billing import CancelledUsage
from services.worker.execution import Progress
from services.worker.identity import identity_of_job

JOB = JobSubmitted(
    job_id="j",
    identity=Identity(tenant="tenants/acme", user="ann"),
    create_time=Timestamp(seconds=1),
)
PROGRESS = Progress(request_id="r", model_version="models/smollm2/versions/1.0.0", token_count=3)


class Recorder:
    def __init__(self, error: Exception | None = None) -> None:
        self.recorded: list[dict[str, Any]] = []
        self._error = error

    async def record(self, **usage: Any) -> int:
        if self._error is not None:
            raise self._error
        self.recorded.append(usage)
        return 0


async def known() -> None:
    """Prices are known."""


def unbilled() -> float:
    return REGISTRY.get_sample_value("headrace_worker_unbilled_jobs_total") or 0.0


async def test_the_tokens_that_arrived_are_recorded() -> None:
    """For the model that answered; nothing if there are none."""
    recorder = Recorder()
    usage = CancelledUsage(cast(Any, recorder), wait_for_prices=known)
    await usage.record(JOB, Progress(request_id="r"))
    assert recorder.recorded == []
    await usage.record(JOB, PROGRESS)
    (recorded,) = recorder.recorded
    assert (recorded["model"], recorded["request_id"]) == ("smollm2", "r")
    assert recorded["usage"].completion_tokens == 3
    assert recorded["identity"] == identity_of_job(JOB)


async def test_usage_that_cannot_be_recorded_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus or the prices are away: the job has ended nevertheless."""
    monkeypatch.setattr(billing, "PRICES_TIMEOUT_SECONDS", 0.01)
    before = unbilled()
    away = Recorder(Unavailable("away", reason="DEPENDENCY_UNAVAILABLE"))
    await CancelledUsage(cast(Any, away), wait_for_prices=known).record(JOB, PROGRESS)
    never = asyncio.Event().wait
    recorder = Recorder()
    await CancelledUsage(cast(Any, recorder), wait_for_prices=never).record(JOB, PROGRESS)
    assert recorder.recorded == []
    assert unbilled() == before + 2


def test_the_usage_id_is_that_of_one_job() -> None:
    """The same in each attempt; another for a later job with the same id, which has expired."""
    later = JobSubmitted()
    later.CopyFrom(JOB)
    later.create_time.seconds += 1
    same = JobSubmitted()
    same.CopyFrom(JOB)
    assert identity_of_job(same) == identity_of_job(JOB)
    assert identity_of_job(later).usage_id != identity_of_job(JOB).usage_id
    assert identity_of_job(JOB).tenant == "acme"
    assert identity_of_job(JOB).scopes == frozenset({"infer"})
