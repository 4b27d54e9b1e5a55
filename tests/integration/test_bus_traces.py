"""One trace goes through NATS, from one process to another, to a real collector."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.support.nats import running_nats
from tests.support.otlp import CollectedSpan, running_collector

pytestmark = pytest.mark.integration

PUBLISHER = """
import asyncio, sys
from headrace.events.v1 import events_pb2
from opentelemetry import trace
from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import USAGE_RECORDED
from libs.telemetry.tracing import current_trace_id, setup_tracing

async def main(nats_url, otlp_endpoint):
    provider = setup_tracing(service="publisher", otlp_endpoint=otlp_endpoint)
    client = await connect(nats_url, name="publisher")
    js = client.jetstream()
    await ensure_streams(js)
    with trace.get_tracer("test").start_as_current_span("request"):
        event = events_pb2.UsageRecorded(usage_id="a")
        await Publisher(js).publish(USAGE_RECORDED, event, message_id="a")
        print("trace:", current_trace_id())
    await client.drain()
    provider.shutdown()

asyncio.run(main(*sys.argv[1:]))
"""

WORKER = """
import asyncio, sys
from opentelemetry import trace
from libs.bus.connection import connect
from libs.bus.subjects import COST
from libs.bus.worker import PullWorker
from libs.telemetry.tracing import current_trace_id, setup_tracing

async def main(nats_url, otlp_endpoint):
    provider = setup_tracing(service="worker", otlp_endpoint=otlp_endpoint)
    client = await connect(nats_url, name="worker")
    done = asyncio.Event()

    async def book(delivery):
        with trace.get_tracer("test").start_as_current_span("book"):
            print("trace:", current_trace_id())
        if delivery.attempt == 1:
            raise RuntimeError("not yet")
        done.set()

    worker = PullWorker(client.jetstream(), COST, concurrency=1)
    running = asyncio.create_task(worker.run(book))
    await done.wait()
    await worker.drain()
    await running
    await client.drain()
    provider.shutdown()

asyncio.run(main(*sys.argv[1:]))
"""


async def run(script: str, *arguments: str) -> list[str]:
    """Runs a script in a process of its own and returns the trace ids that it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    lines = output.decode().splitlines()
    return [line.removeprefix("trace: ") for line in lines if line.startswith("trace: ")]


async def test_the_worker_continues_the_publishers_trace(tmp_path: Path) -> None:
    """Request, publish, process and what the handler does are one tree; retries are siblings."""
    async with running_nats(tmp_path) as server, running_collector() as collector:
        published_in, *_ = await run(PUBLISHER, server.url, collector.endpoint)
        handled_in = await run(WORKER, server.url, collector.endpoint)
        assert handled_in == [published_in, published_in]
        spans = await collector.wait_for(lambda spans: len(spans) >= 6)

    def of(name: str) -> list[CollectedSpan]:
        return [span for span in spans if span.name.startswith(name)]

    (request,), (publish,) = of("request"), of("publish")
    assert {span.trace_id for span in spans} == {published_in}
    assert (publish.service, publish.kind) == ("publisher", "PRODUCER")
    assert publish.parent_span_id == request.span_id
    assert [span.kind for span in of("process")] == ["CONSUMER", "CONSUMER"]
    assert {span.service for span in of("process")} == {"worker"}
    assert {span.parent_span_id for span in of("process")} == {publish.span_id}
    assert [span.attributes["headrace.outcome"] for span in of("process")] == ["retried", "done"]
    assert {span.parent_span_id for span in of("book")} == {span.span_id for span in of("process")}
