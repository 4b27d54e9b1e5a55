"""Composes the cost service and runs it."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.cost.v1 import cost_internal_pb2_grpc, cost_pb2_grpc
from headrace.events.v1 import events_pb2

from libs.bus.connection import ensure_streams
from libs.bus.service import connect_service
from libs.bus.subjects import COST, USAGE
from libs.bus.worker import PullWorker
from libs.config import default_database_url
from libs.db import create_engine, migrate
from libs.process import process, run
from services.cost.backlog import UsageBacklog
from services.cost.config import Settings
from services.cost.consumer import UsageConsumer
from services.cost.internal_servicer import CostInternalServicer
from services.cost.ledger import Ledger
from services.cost.price_book import PriceBook
from services.cost.servicer import CostServicer
from services.cost.store import CostStore
from services.cost.usage_store import UsageStore


async def main() -> None:
    """Runs the service until it is stopped."""
    settings = Settings()
    async with process("cost", settings) as running:
        database_url = settings.database_url or default_database_url(settings.home, "cost")
        await migrate(database_url, "cost")
        engine = create_engine(database_url)
        store = CostStore(engine)
        price_book = PriceBook(store, running.clock, poll_seconds=settings.price_poll_seconds)
        await price_book.refresh()
        running.spawn(price_book.poll())
        running.on_drain(price_book.close)

        bus = await connect_service(settings, name="cost")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[USAGE])
        ledger = Ledger(store, price_book, running.clock)
        worker = PullWorker[events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded](
            jetstream, COST, concurrency=settings.booking_concurrency
        )
        running.spawn(worker.run(UsageConsumer(ledger).handle))

        servicer = CostServicer(
            store=store,
            usage=UsageStore(engine),
            price_book=price_book,
            backlog=UsageBacklog(jetstream, running.clock),
            clock=running.clock,
        )
        server = running.server.grpc
        cost_pb2_grpc.add_CostServiceServicer_to_server(servicer, server)
        cost_internal_pb2_grpc.add_CostInternalServiceServicer_to_server(
            CostInternalServicer(price_book), server
        )
        await running.serve()
        await worker.drain(settings.drain_seconds)
        await bus.drain()
        await engine.dispose()


if __name__ == "__main__":
    run(main())
