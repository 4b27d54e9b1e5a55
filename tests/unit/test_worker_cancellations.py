"""Jobs are stopped when they are cancelled, whenever that is."""

from __future__ import annotations

import asyncio

import pytest
from headrace.events.v1.events_pb2 import JobCancelled

from libs.errors import Cancelled
from services.worker.cancellations import Cancellation, Cancellations, JobCancelledError


async def is_cancelled(cancellation: Cancellation, work: Work) -> bool:
    try:
        await cancellation.run(work)
    except JobCancelledError:
        return True
    return False


class Work:
    """Waits until it is interrupted, and then ends as calls end."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.running = asyncio.Event()
        self.interruptions = 0
        self._error = error

    async def __call__(self) -> str:
        self.running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.interruptions += 1
            if self._error is not None:
                raise self._error from None
            raise
        raise AssertionError


@pytest.mark.parametrize("error", [None, Cancelled("cancelled", reason="CANCELLED")])
async def test_a_job_that_runs_is_interrupted(error: Exception | None) -> None:
    """Whatever its call makes of that; cancelling it twice is the same as once."""
    cancellations, work = Cancellations(), Work(error=error)

    async def run() -> None:
        with cancellations.of("j") as cancellation:
            await cancellation.run(work)

    running = asyncio.create_task(run())
    await work.running.wait()
    cancellations.cancel(JobCancelled(job_id="another"))
    await asyncio.sleep(0)
    assert work.interruptions == 0
    cancellations.cancel(JobCancelled(job_id="j"))
    cancellations.cancel(JobCancelled(job_id="j"))
    with pytest.raises(JobCancelledError):
        await running
    assert work.interruptions == 1
    assert not cancellations._by_job


async def test_a_job_that_is_cancelled_before_it_runs_does_not_run() -> None:
    """Such as while its record is read."""
    cancellations, work = Cancellations(), Work()
    with cancellations.of("j") as cancellation:
        cancellations.cancel(JobCancelled(job_id="j"))
        assert await is_cancelled(cancellation, work)
    assert not work.running.is_set()


async def test_a_job_that_has_ended_is_not_interrupted() -> None:
    """Its outcome is reported."""
    cancellations = Cancellations()

    async def work() -> str:
        return "done"

    with cancellations.of("j") as cancellation:
        assert await cancellation.run(work) == "done"
        cancellations.cancel(JobCancelled(job_id="j"))
        await asyncio.sleep(0.01)
    cancellations.cancel(JobCancelled(job_id="j"))


async def test_a_worker_that_stops_is_not_a_cancellation() -> None:
    """The task is cancelled from outside: the job returns to the queue."""
    cancellations, work = Cancellations(), Work()

    async def run() -> None:
        with cancellations.of("j") as cancellation:
            await cancellation.run(work)

    running = asyncio.create_task(run())
    await work.running.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_errors_of_the_work_stay_as_they_are() -> None:
    """Also a timeout of its own."""

    async def work() -> None:
        raise TimeoutError

    with Cancellations().of("j") as cancellation, pytest.raises(TimeoutError):
        await cancellation.run(work)
