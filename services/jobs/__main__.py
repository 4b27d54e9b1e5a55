"""Puts the parts of the jobs service together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from datetime import timedelta

from headrace.jobs.v1 import jobs_pb2_grpc

from libs.bus.broadcast import Broadcaster
from libs.bus.connection import ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.service import connect_service
from libs.bus.subjects import JOB_RECORDS, JOBS, OUTCOMES
from libs.bus.worker import PullWorker
from libs.config import default_database_url
from libs.db import create_engine, migrate
from libs.process import process, run
from services.jobs.config import Settings
from services.jobs.consumer import JobEvent, OutcomeConsumer
from services.jobs.erasure import Erasure
from services.jobs.expiry import ExpiredJobs
from services.jobs.outbox import OutboxPublisher
from services.jobs.outbox_store import OutboxStore
from services.jobs.reconciler import Reconciler
from services.jobs.records import JobRecords
from services.jobs.servicer import JobServicer
from services.jobs.store import JobStore
from services.jobs.submission import Submission
from services.jobs.watchers import JobWatchers


async def main() -> None:
    """Runs the service until it is stopped."""
    settings = Settings()
    async with process("jobs", settings) as running:
        clock = running.clock
        database_url = settings.database_url or default_database_url(settings.home, "jobs")
        await migrate(database_url, "jobs")
        engine = create_engine(database_url)
        store, outbox_store = JobStore(engine), OutboxStore(engine)
        retention = timedelta(seconds=settings.job_retention_seconds)

        bus = await connect_service(settings, name="jobs")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[JOBS, OUTCOMES])

        watchers = JobWatchers(
            limit=settings.max_job_watchers, poll_seconds=settings.watch_poll_seconds
        )
        running.on_drain(watchers.close)
        erasure = Erasure(store=store, js=jetstream)
        records = JobRecords(
            store=store,
            watchers=watchers,
            broadcaster=Broadcaster(bus),
            erasure=erasure,
            clock=clock,
            retention=retention,
            max_result_bytes=settings.max_result_bytes,
        )
        outbox = OutboxPublisher(
            store=outbox_store,
            records=records,
            publisher=Publisher(jetstream),
            clock=clock,
            poll_seconds=settings.outbox_poll_seconds,
        )
        reconciler = Reconciler(
            store=store,
            outbox_store=outbox_store,
            records=records,
            outbox=outbox,
            js=jetstream,
            clock=clock,
            interval_seconds=settings.reconcile_seconds,
            lost_after_seconds=settings.job_lost_after_seconds,
            max_publishes=settings.max_job_publishes,
            max_waiting=settings.max_waiting_jobs,
        )
        expired = ExpiredJobs(
            store=store,
            erasure=erasure,
            clock=clock,
            interval_seconds=settings.job_expiry_seconds,
            retention=retention,
        )
        outcomes = PullWorker[JobEvent](
            jetstream, JOB_RECORDS, concurrency=settings.outcome_concurrency
        )
        running.spawn(outbox.run())
        running.spawn(reconciler.run())
        running.spawn(expired.run())
        running.spawn(outcomes.run(OutcomeConsumer(records).handle))

        submission = Submission(
            store=store, outbox=outbox, clock=clock, limits=settings.waiting_limits()
        )
        servicer = JobServicer(
            submission=submission, store=store, records=records, watchers=watchers, clock=clock
        )
        jobs_pb2_grpc.add_JobServiceServicer_to_server(servicer, running.server.grpc)
        await running.serve()
        await outcomes.drain(settings.drain_seconds)
        await bus.drain()
        await engine.dispose()


if __name__ == "__main__":
    run(main())
