"""Limits of the jobs service: how long it keeps jobs, and how many may wait."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from libs.errors import NotFound, ResourceExhausted
from libs.rpc.status import headrace_errors
from tests.support.jobs import QUEUED, RUNNING, JobClient, generation, id_of, job_bus, result
from tests.support.nats import running_nats
from tests.support.service import running_service

pytestmark = pytest.mark.integration


async def test_jobs_expire_and_are_deleted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """They do not exist any more, from `expire_time` on; the id can be used again."""
    home = tmp_path_factory.mktemp("expiry")
    async with (
        running_nats(tmp_path_factory.mktemp("nats")) as nats,
        running_service(
            "jobs",
            home,
            HEADRACE_NATS_URL=nats.url,
            HEADRACE_JOB_RETENTION_SECONDS="1",
            HEADRACE_JOB_EXPIRY_SECONDS="2",
        ) as service,
        service.channel() as channel,
        job_bus(nats.url) as bus,
    ):
        client = JobClient(channel)
        waiting = await client.submit(generation())
        job = await client.submit(generation())
        assert not job.HasField("expire_time")
        await bus.finished(job, result=result())
        ended = await client.ended(job.name)
        kept = ended.expire_time.ToDatetime() - ended.update_time.ToDatetime()
        assert kept == timedelta(seconds=1)
        await asyncio.sleep(1)
        for call in (client.get, client.cancel):
            with pytest.raises(NotFound), headrace_errors():
                await call(job.name)
        with pytest.raises(NotFound), headrace_errors():
            await anext(client.watch(job.name))
        assert [listed.name for listed in (await client.list()).jobs] == [waiting.name]
        async with asyncio.timeout(20):
            while "expired jobs deleted" not in service.log.read_text():  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.1)
        again = await client.submit(generation("another"), job_id=id_of(job))
        assert again.state == QUEUED
        assert (await client.get(waiting.name)) == waiting


async def test_more_jobs_than_may_wait_are_refused_until_one_starts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With the limit and when to retry; accepted jobs are still returned."""
    async with (
        running_nats(tmp_path_factory.mktemp("nats")) as nats,
        running_service(
            "jobs",
            tmp_path_factory.mktemp("full"),
            HEADRACE_NATS_URL=nats.url,
            HEADRACE_MAX_WAITING_JOBS="2",
            HEADRACE_MAX_WAITING_JOBS_PER_TENANT="2",
        ) as service,
        service.channel() as channel,
        job_bus(nats.url) as bus,
    ):
        client = JobClient(channel)
        first = await client.submit(generation())
        second = await client.submit(generation())
        with pytest.raises(ResourceExhausted) as caught, headrace_errors():
            await client.submit(generation())
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.metadata == {"queue": "jobs", "limit": "2"}
        assert caught.value.retry_after_seconds == 5.0
        assert await client.submit(generation(), job_id=id_of(second)) == second
        watch = client.watch(first.name)
        await anext(watch)
        await bus.started(first, 1)
        assert (await anext(watch)).state == RUNNING
        await client.submit(generation())
