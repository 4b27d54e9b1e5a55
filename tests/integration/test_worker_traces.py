"""One trace leads from the submission of a job through the bus and the worker to the ledger."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.support.job_mesh import job_mesh
from tests.support.jobs import SUCCEEDED, generation, usage_recorder
from tests.support.otlp import CollectedSpan, running_collector
from tests.support.service import running_service
from tests.support.usage import CostClient

pytestmark = pytest.mark.integration

# Service, kind and name of each span, each the parent of the next. Between the worker's call and
# the ledger stand the models of the test, which carry the trace on and export nothing.
PATH = [
    ("jobs", "SERVER", "headrace.jobs.v1.JobService/SubmitJob"),
    ("jobs", "PRODUCER", "publish headrace.jobs.job.submitted"),
    ("worker", "CONSUMER", "process headrace.jobs.job.submitted"),
    ("worker", "CLIENT", "/headrace.inference.v1.InferenceService/Generate"),
    ("cost", "CONSUMER", "process headrace.inference.usage.recorded"),
]
OUTCOMES = [
    ("jobs", "CONSUMER", "process headrace.worker.job.started"),
    ("jobs", "CONSUMER", "process headrace.worker.job.finished"),
]


def key(span: CollectedSpan) -> tuple[str, str, str]:
    return span.service, span.kind, span.name


async def test_one_trace_from_submission_to_ledger(tmp_path: Path) -> None:
    """It is the caller's trace, each span hangs on the one before, and the logs name it."""
    trace_id, caller_span = secrets.token_hex(16), secrets.token_hex(8)
    (tmp_path / "cost").mkdir()
    (tmp_path / "mesh").mkdir()
    async with running_collector() as collector:
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        async with (
            job_mesh(tmp_path / "mesh", **exporting) as mesh,
            running_service(
                "cost",
                tmp_path / "cost",
                preexec=None,
                HEADRACE_NATS_URL=mesh.nats.url,
                **exporting,
            ) as cost,
            cost.channel() as channel,
        ):
            await CostClient(channel).create_price()
            mesh.models.recorder = usage_recorder(mesh.bus)
            worker = await mesh.worker(**exporting)
            job = await mesh.client.submit(
                generation(), metadata=(("traceparent", f"00-{trace_id}-{caller_span}-01"),)
            )
            ended = await mesh.client.ended(job.name)
            assert ended.state == SUCCEEDED
            final = ended.result.generate.final
            booked = await CostClient(channel).request_cost(final.request_id)
            assert booked.cost_nano_usd == final.cost_nano_usd > 0

            wanted = {*PATH, *OUTCOMES}
            spans = [
                span
                for span in await collector.wait_for(
                    lambda came: wanted <= {key(span) for span in came if span.trace_id == trace_id}
                )
                if span.trace_id == trace_id
            ]
            logged = [json.loads(line) for line in cost.log.read_text().splitlines()]
            logged += [json.loads(line) for line in mesh.jobs.log.read_text().splitlines()]
            assert worker.process.returncode is None

    by_id = {span.span_id: span for span in spans}
    (submission,) = [span for span in spans if key(span) == PATH[0]]
    assert submission.parent_span_id == caller_span
    (processing,) = [span for span in spans if key(span) == PATH[2]]
    assert [key(span) for span in ancestors(processing, by_id)] == PATH[1::-1]
    (call,) = [span for span in spans if key(span) == PATH[3]]
    assert ancestors(call, by_id)[0] == processing
    for outcome in OUTCOMES:
        (span,) = [span for span in spans if key(span) == outcome]
        assert processing in ancestors(span, by_id)
    (booking,) = [span for span in spans if key(span) == PATH[4]]
    assert booking.parent_span_id == call.span_id
    assert "job ended" in {line["event"] for line in logged if line.get("trace_id") == trace_id}


def ancestors(span: CollectedSpan, by_id: dict[str, CollectedSpan]) -> list[CollectedSpan]:
    """Returns the spans that a span hangs on, the nearest first."""
    found = []
    while (parent := by_id.get(span.parent_span_id)) is not None:
        found.append(parent)
        span = parent
    return found
