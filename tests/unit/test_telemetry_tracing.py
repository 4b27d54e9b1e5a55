"""Traces, as a process of its own makes them, with a real collector."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from opentelemetry.proto.trace.v1 import trace_pb2

from tests.support.otlp import running_collector

SETUP = """
import json, sys, time
from opentelemetry import propagate, trace
from libs.telemetry.tracing import current_trace_id, setup_tracing

tracer = trace.get_tracer("test")
SAMPLED = {"traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}

def report(**facts):
    print(json.dumps(facts))
"""
# Nothing listens on the discard port: connections are refused.
NOWHERE = "http://127.0.0.1:9"


async def run(script: str, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SETUP + script, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0
    facts: dict[str, Any] = json.loads(output)
    return facts


async def test_without_a_collector_ids_are_made_and_nothing_is_recorded() -> None:
    """Clients get a trace id in any case; the exporter is not even imported."""
    facts = await run("""
before = current_trace_id()
setup_tracing(service="test")
with tracer.start_as_current_span("a") as span:
    first = current_trace_id()
    with tracer.start_as_current_span("b"):
        second = current_trace_id()
    recording = span.is_recording()
report(before=before, first=first, second=second, recording=recording,
     exporter=any("otlp" in name for name in sys.modules))
""")
    assert facts["before"] == ""
    assert len(facts["first"]) == 32
    assert facts["first"] == facts["second"]
    assert facts["recording"] is False
    assert facts["exporter"] is False


async def test_a_trace_from_outside_is_continued() -> None:
    """W3C context in, the same trace id out; other baggage is left behind."""
    facts = await run("""
setup_tracing(service="test")
context = propagate.extract({**SAMPLED, "baggage": "user=ann"})
with tracer.start_as_current_span("a", context=context):
    headers = {}
    propagate.inject(headers)
    report(here=current_trace_id(), headers=headers)
""")
    assert facts["here"] == "0123456789abcdef0123456789abcdef"
    assert facts["headers"]["traceparent"].split("-")[1] == facts["here"]
    assert "baggage" not in facts["headers"]


async def test_spans_reach_the_collector_before_the_process_ends() -> None:
    """`shutdown` sends what waits."""
    async with running_collector() as collector:
        facts = await run(
            """
provider = setup_tracing(service="test", otlp_endpoint=sys.argv[1])
with tracer.start_as_current_span("a", attributes={"answer": 42}):
    report(trace_id=current_trace_id())
provider.shutdown()
""",
            collector.endpoint,
        )
        (span,) = await collector.wait_for(lambda spans: len(spans) == 1)
    assert (span.service, span.name) == ("test", "a")
    assert span.trace_id == facts["trace_id"]


async def test_spans_have_no_messages_of_errors() -> None:
    """They may quote requests; the status says that there was an error."""
    async with running_collector() as collector:
        await run(
            """
provider = setup_tracing(service="test", otlp_endpoint=sys.argv[1])
try:
    with tracer.start_as_current_span("a") as span:
        span.record_exception(KeyError("my secret"))
        raise ValueError("my secret")
except ValueError:
    report()
provider.shutdown()
""",
            collector.endpoint,
        )
        (span,) = await collector.wait_for(bool)
    assert b"my secret" not in span.serialized
    sent = trace_pb2.Span.FromString(span.serialized)
    assert sent.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert list(sent.events) == []


async def test_sampling_follows_the_parent() -> None:
    """At 0 % no trace is sampled here, but traces sampled elsewhere include the spans made here."""
    async with running_collector() as collector:
        await run(
            """
provider = setup_tracing(service="test", sample_percent=0.0, otlp_endpoint=sys.argv[1])
for number in range(20):
    with tracer.start_as_current_span("starts here"):
        pass
with tracer.start_as_current_span("goes on", context=propagate.extract(SAMPLED)):
    report(trace_id=current_trace_id())
provider.shutdown()
""",
            collector.endpoint,
        )
        spans = await collector.wait_for(bool)
    assert [span.name for span in spans] == ["goes on"]


async def test_a_share_of_the_traces_is_sampled() -> None:
    """At 25 %, about that many, and whole traces."""
    async with running_collector() as collector:
        await run(
            """
provider = setup_tracing(service="test", sample_percent=25.0, otlp_endpoint=sys.argv[1])
for number in range(1000):
    with tracer.start_as_current_span("outer"), tracer.start_as_current_span("inner"):
        pass
report()
provider.shutdown()
""",
            collector.endpoint,
        )
        spans = await collector.wait_for(lambda spans: len(spans) > 300)
    outer = {span.trace_id for span in spans if span.name == "outer"}
    inner = {span.trace_id for span in spans if span.name == "inner"}
    assert 150 < len(outer) < 350
    assert outer == inner


async def test_a_collector_that_is_away_holds_nothing_up() -> None:
    """Spans are dropped beyond the limit, requests go on at speed, and the end comes soon."""
    facts = await run(
        """
from prometheus_client import REGISTRY
from libs.telemetry.export import SPAN_QUEUE_LIMIT

provider = setup_tracing(service="test", otlp_endpoint=sys.argv[1])
started = time.perf_counter()
for number in range(2 * SPAN_QUEUE_LIMIT):
    with tracer.start_as_current_span("a"):
        pass
made = time.perf_counter()
provider.shutdown()
report(span_seconds=(made - started) / (2 * SPAN_QUEUE_LIMIT),
     shutdown_seconds=time.perf_counter() - made,
     waiting=REGISTRY.get_sample_value("headrace_telemetry_spans_waiting"),
     dropped=REGISTRY.get_sample_value("headrace_telemetry_spans_dropped_total"),
     limit=SPAN_QUEUE_LIMIT)
""",
        NOWHERE,
    )
    assert facts["span_seconds"] < 0.002
    assert facts["shutdown_seconds"] < 5
    assert 0 < facts["waiting"] <= facts["limit"]
    assert facts["dropped"] > 0
