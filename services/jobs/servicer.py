"""`headrace.jobs.v1.JobService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from typing_extensions import override

from libs.errors import NotFound
from libs.rpc.identity import Context, identity_of
from services.jobs.domain import Job
from services.jobs.store import JobStore
from services.jobs.submission import Submission
from services.jobs.watchers import JobWatchers
from services.jobs.wire import job_id_of_name, job_to_proto


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Parses, asks, answers. Callers see the jobs of their own tenant."""

    def __init__(self, *, submission: Submission, store: JobStore, watchers: JobWatchers) -> None:
        self._submission = submission
        self._store = store
        self._watchers = watchers

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
        job = await self._job(job_id_of_name(request.name), identity_of(context).tenant)
        return jobs_pb2.GetJobResponse(job=job_to_proto(job))

    @override
    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        job_id, tenant = job_id_of_name(request.name), identity_of(context).tenant
        changes = self._watchers.watch(job_id, lambda: self._job(job_id, tenant))
        async with aclosing(changes):
            async for job in changes:
                yield jobs_pb2.WatchJobResponse(job=job_to_proto(job))

    async def _job(self, job_id: str, tenant: str) -> Job:
        job = await self._store.get(job_id, tenant=tenant)
        if job is None:
            raise NotFound.of_resource(f"jobs/{job_id}")
        return job
