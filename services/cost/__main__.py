"""The cost service's parts, put together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.cost.v1 import cost_pb2_grpc
from headrace.events.v1 import events_pb2

from libs.bus.connection import connect, ensure_streams
from libs.bus.subjects import COST, USAGE
from libs.bus.worker import PullWorker
from libs.config import default_database_url
from libs.db import create_engine, migrate
from libs.process import process, run
from services.cost.backlog import UsageBacklog
from services.cost.config import Settings
from services.cost.consumer import UsageConsumer
from services.cost.ledger import Ledger
from services.cost.price_book import PriceBook
from services.cost.servicer import CostServicer
from services.cost.store import CostStore


async def main() -> None:
    """Runs the service until it is told to end."""
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

        bus = await connect(settings.nats_url, name="cost")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[USAGE])
        ledger = Ledger(store, price_book, running.clock)
        worker = PullWorker[events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded](
            jetstream, COST, concurrency=settings.booking_concurrency
        )
        running.spawn(worker.run(UsageConsumer(ledger).handle))

        servicer = CostServicer(
            store=store,
            price_book=price_book,
            backlog=UsageBacklog(jetstream, running.clock),
            clock=running.clock,
        )
        cost_pb2_grpc.add_CostServiceServicer_to_server(servicer, running.server.grpc)
        await running.serve()
        await worker.drain(settings.drain_seconds)
        await bus.drain()
        await engine.dispose()


if __name__ == "__main__":
    run(main())
