"""`headrace.jobs.v1.JobService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import NotFound
from libs.rpc.identity import Context, identity_of
from libs.rpc.paging import PageRequest
from services.jobs.domain import Job
from services.jobs.records import JobRecords
from services.jobs.store import JobFilter, JobStore
from services.jobs.submission import Submission
from services.jobs.watchers import JobWatchers
from services.jobs.wire import (
    check_no_batch,
    is_full,
    job_id_of_name,
    job_to_proto,
    state_of_filter,
)


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Translates requests and responses. Callers see the jobs of their own tenant."""

    def __init__(
        self,
        *,
        submission: Submission,
        store: JobStore,
        records: JobRecords,
        watchers: JobWatchers,
        clock: Clock,
    ) -> None:
        self._submission = submission
        self._store = store
        self._records = records
        self._watchers = watchers
        self._clock = clock

    @override
    async def SubmitJob(
        self, request: jobs_pb2.SubmitJobRequest, context: Context
    ) -> jobs_pb2.SubmitJobResponse:
        job = await self._submission.submit(request, identity_of(context))
        return jobs_pb2.SubmitJobResponse(job=job_to_proto(job))

    @override
    async def GetJob(
        self, request: jobs_pb2.GetJobRequest, context: Context
    ) -> jobs_pb2.GetJobResponse:
        full = is_full(request.view, default=True)
        job = await self._job(job_id_of_name(request.name), identity_of(context).tenant, full=full)
        return jobs_pb2.GetJobResponse(job=job_to_proto(job, full=full))

    @override
    async def ListJobs(
        self, request: jobs_pb2.ListJobsRequest, context: Context
    ) -> jobs_pb2.ListJobsResponse:
        check_no_batch(request.parent)
        full = is_full(request.view, default=False)
        wanted = JobFilter(
            tenant=identity_of(context).tenant,
            state=state_of_filter(request.filter),
            now=self._clock.now(),
            full=full,
        )
        page = await self._store.list(
            wanted, PageRequest.parse(request.page_size, request.page_token)
        )
        return jobs_pb2.ListJobsResponse(
            jobs=[job_to_proto(job, full=full) for job in page.rows],
            next_page_token=page.next_page_token,
        )

    @override
    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        full = is_full(request.view, default=True)
        job_id, tenant = job_id_of_name(request.name), identity_of(context).tenant
        changes = self._watchers.watch(
            job_id, lambda: self._job(job_id, tenant, full=full), tenant=tenant
        )
        async with aclosing(changes):
            async for job in changes:
                yield jobs_pb2.WatchJobResponse(job=job_to_proto(job, full=full))

    @override
    async def CancelJob(
        self, request: jobs_pb2.CancelJobRequest, context: Context
    ) -> jobs_pb2.CancelJobResponse:
        job_id, tenant = job_id_of_name(request.name), identity_of(context).tenant
        await self._job(job_id, tenant, full=False)
        await self._records.cancel(job_id)
        return jobs_pb2.CancelJobResponse(job=job_to_proto(await self._job(job_id, tenant)))

    @override
    async def DeleteJob(
        self, request: jobs_pb2.DeleteJobRequest, context: Context
    ) -> jobs_pb2.DeleteJobResponse:
        job_id = job_id_of_name(request.name)
        if not await self._records.delete(job_id, tenant=identity_of(context).tenant):
            raise NotFound.of_resource(f"jobs/{job_id}")
        return jobs_pb2.DeleteJobResponse()

    async def _job(self, job_id: str, tenant: str, *, full: bool = True) -> Job:
        job = await self._store.get(job_id, tenant=tenant, now=self._clock.now(), full=full)
        if job is None:
            raise NotFound.of_resource(f"jobs/{job_id}")
        return job
