"""Puts the parts of the worker together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.embedding.v1 import embedding_pb2_grpc
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2_grpc

from libs.bus.broadcast import listen
from libs.bus.connection import ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.service import connect_service
from libs.bus.subjects import JOB_CANCELLED, JOBS, OUTCOMES, USAGE, WORKER
from libs.bus.worker import PullWorker
from libs.metering.usage import UsageRecorder
from libs.process import process, run
from libs.rpc.channel import open_channel
from services.worker.billing import CancelledUsage
from services.worker.cancellations import Cancellations
from services.worker.config import Settings
from services.worker.execution import Execution
from services.worker.prices import Prices
from services.worker.records import JobRecords
from services.worker.runner import JobRunner


async def main() -> None:
    """Runs the worker until it is stopped."""
    settings = Settings()
    async with (
        process("worker", settings) as running,
        open_channel(settings.inference_address, tls=settings.tls) as inference,
        open_channel(settings.embedding_cache_address, tls=settings.tls) as embedding_cache,
        open_channel(settings.jobs_address, tls=settings.tls) as jobs,
        open_channel(settings.cost_address, tls=settings.tls, traced=False) as cost,
    ):
        clock = running.clock
        bus = await connect_service(settings, name="worker")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[JOBS, OUTCOMES, USAGE], update=False)
        publisher = Publisher(jetstream)
        prices = Prices(cost, clock)
        cancellations = Cancellations()
        await listen(bus, JOB_CANCELLED, cancellations.cancel)
        runner = JobRunner(
            execution=Execution(
                inference=inference_pb2_grpc.InferenceServiceStub(inference),
                embedding=embedding_pb2_grpc.EmbeddingServiceStub(embedding_cache),
                timeout_seconds=settings.job_timeout_seconds,
                max_result_bytes=settings.max_result_bytes,
            ),
            records=JobRecords(jobs_pb2_grpc.JobServiceStub(jobs)),
            cancellations=cancellations,
            cancelled_usage=CancelledUsage(
                UsageRecorder(publisher, clock, prices=prices.current),
                wait_for_prices=prices.wait_known,
            ),
            publisher=publisher,
            clock=clock,
        )
        worker = PullWorker[events_pb2.JobSubmitted](
            jetstream,
            WORKER,
            concurrency=settings.worker_concurrency,
            on_exhausted=runner.give_up,
        )
        running.spawn(prices.run())
        running.spawn(worker.run(runner.handle))
        await running.serve()
        # What does not end in time goes back to the bus immediately, for another worker.
        await worker.drain(settings.drain_seconds)
        await bus.drain()


if __name__ == "__main__":
    run(main())
