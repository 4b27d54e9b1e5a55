"""The whole mesh, as its users see it: through the edge, with a real language model."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

from tests.support.mesh import CollectorThread, RunningMesh
from tests.support.otlp import CollectedSpan

pytestmark = pytest.mark.integration

VERSION = "models/smollm2/versions/1.0.0"
LEDGER_SECONDS = 15.0


@dataclass
class Streamed:
    """What came of one `Generate`.

    Attributes:
        arrivals: seconds from the call to each message.
    """

    text: str = ""
    token_count: int = 0
    arrivals: list[float] = field(default_factory=list)
    finals: list[inference_pb2.Final] = field(default_factory=list)
    last_is_final: bool = False

    @property
    def final(self) -> inference_pb2.Final:
        (final,) = self.finals
        return final


@pytest.fixture
async def channel(mesh: RunningMesh) -> AsyncIterator[grpc.aio.Channel]:
    async with mesh.channel() as channel:
        yield channel


def ask(question: str, **options: Any) -> inference_pb2.GenerateRequest:
    """Returns a request for a short greedy answer."""
    fields: dict[str, Any] = {"model": "smollm2", "max_tokens": 48, **options}
    return inference_pb2.GenerateRequest(
        messages=[inference_pb2.Message(role="user", content=question)], **fields
    )


async def generate(
    channel: grpc.aio.Channel,
    request: inference_pb2.GenerateRequest,
    metadata: tuple[tuple[str, str], ...],
) -> Streamed:
    """Reads a whole stream."""
    streamed = Streamed()
    began = time.monotonic()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    async for message in stub.Generate(request, metadata=metadata):
        streamed.arrivals.append(time.monotonic() - began)
        streamed.last_is_final = message.HasField("final")
        if streamed.last_is_final:
            streamed.finals.append(message.final)
        else:
            streamed.text += message.delta.text
            streamed.token_count += message.delta.token_count
    return streamed


async def test_an_answer_streams_token_by_token(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Tokens come as the model makes them, then one final message that tells everything."""
    request = ask("Why is the sky blue?", request_id=str(uuid.uuid4()))

    streamed = await generate(channel, request, mesh.metadata())

    final = streamed.final
    assert streamed.last_is_final
    assert streamed.text.strip()
    assert final.finish_reason in {"stop", "length"}
    assert final.usage.completion_tokens == streamed.token_count > 10
    assert final.usage.prompt_tokens > 0
    assert final.model_version == VERSION
    assert final.artifact_digest.startswith("sha256:")
    assert len(final.artifact_digest) == len("sha256:") + 64
    assert final.route.deployment == "deployments/smollm2"
    assert final.route.reason
    assert final.request_id == request.request_id
    assert len(bytes.fromhex(final.trace_id)) == 16
    # Many messages over most of the time: not the whole text at the end.
    assert len(streamed.arrivals) > 10
    assert streamed.arrivals[0] < 0.8 * streamed.arrivals[-1]
    assert final.time_to_first_token_ms <= streamed.arrivals[0] * 1000 + 1


async def test_greedy_answers_repeat(mesh: RunningMesh, channel: grpc.aio.Channel):
    """The same question has the same answer, and what was computed for it is not computed again."""
    first = await generate(channel, ask("Name three rivers."), mesh.metadata())
    second = await generate(channel, ask("Name three rivers."), mesh.metadata())

    assert second.text == first.text
    assert second.final.usage.cached_tokens > 0


async def test_answers_that_run_together_do_not_mix(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Requests share the engine's batches; each gets the answer that it gets alone."""
    questions = ["Name three rivers.", "What is two plus two?", "Who wrote Hamlet?"]
    alone = [await generate(channel, ask(q), mesh.metadata()) for q in questions]

    together = await asyncio.gather(
        *(generate(channel, ask(q), mesh.metadata()) for q in questions * 2)
    )

    assert [s.text for s in together] == [s.text for s in alone] * 2


async def test_cost_is_the_same_everywhere(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Told, booked, posted and summed: the same to the nano-dollar, of every kind of token."""
    tenant = f"t-{uuid.uuid4().hex[:12]}"
    metadata = mesh.metadata(tenant=tenant, user="bob")
    since = timestamp_pb2.Timestamp()
    since.FromDatetime(datetime.now(UTC))
    streams = [await generate(channel, ask("Name three rivers."), metadata) for _ in range(2)]
    finals = [streamed.final for streamed in streams]
    stub = cost_pb2_grpc.CostServiceStub(channel)

    booked = [
        await stub.GetRequestCost(
            cost_pb2.GetRequestCostRequest(request_id=final.request_id), metadata=metadata
        )
        for final in finals
    ]
    usage = await stub.QueryUsage(
        cost_pb2.QueryUsageRequest(model="smollm2", start_time=since), metadata=metadata
    )

    for final, cost in zip(finals, booked, strict=True):
        assert final.cost_nano_usd > 0
        assert cost.cost_nano_usd == final.cost_nano_usd
        assert sum(posting.cost_nano_usd for posting in cost.postings) == final.cost_nano_usd
        quantities = {posting.kind: posting.quantity_tokens for posting in cost.postings}
        cached = final.usage.cached_tokens
        assert quantities.get("input", 0) == final.usage.prompt_tokens - cached
        assert quantities.get("cached_input", 0) == cached
        assert quantities.get("output", 0) == final.usage.completion_tokens
        assert (cost.tenant, cost.user, cost.model_version) == (tenant, "bob", VERSION)
    (row,) = usage.rows
    assert (row.tenant, row.user, row.model, row.request_count) == (tenant, "bob", "smollm2", 2)
    assert row.cost_nano_usd == usage.cost_nano_usd == sum(f.cost_nano_usd for f in finals)
    assert row.completion_tokens == sum(final.usage.completion_tokens for final in finals)


async def test_a_tenant_sees_only_its_own_costs(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Neither a request's cost nor sums of another tenant are told."""
    streamed = await generate(channel, ask("Name a colour."), mesh.metadata())
    stub = cost_pb2_grpc.CostServiceStub(channel)
    stranger = mesh.metadata(tenant="stranger", user="eve", scopes="infer")

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetRequestCost(
            cost_pb2.GetRequestCostRequest(request_id=streamed.final.request_id), metadata=stranger
        )
    usage = await stub.QueryUsage(cost_pb2.QueryUsageRequest(), metadata=stranger)

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert {row.tenant for row in usage.rows} <= {"stranger"}


async def test_embeddings_come_from_the_cache_the_second_time(
    mesh: RunningMesh, channel: grpc.aio.Channel
):
    """Hits are counted, give the same vectors, and cost the cached price."""
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    texts = [f"{uuid.uuid4()} water", f"{uuid.uuid4()} wheel"]
    request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)

    first = await stub.Embed(request, metadata=mesh.metadata())
    second = await stub.Embed(request, metadata=mesh.metadata())

    assert (first.hit_count, second.hit_count) == (0, 2)
    assert second.embeddings == first.embeddings
    for embedding in first.embeddings:
        assert len(embedding.values) == 384
        assert sum(value * value for value in embedding.values) == pytest.approx(1, abs=1e-4)
    assert second.usage.cached_tokens == second.usage.prompt_tokens == first.usage.prompt_tokens
    assert 0 < second.cost_nano_usd < first.cost_nano_usd
    cost = await cost_pb2_grpc.CostServiceStub(channel).GetRequestCost(
        cost_pb2.GetRequestCostRequest(request_id=first.request_id), metadata=mesh.metadata()
    )
    assert cost.cost_nano_usd == first.cost_nano_usd


async def test_embeddings_know_what_is_alike(mesh: RunningMesh, channel: grpc.aio.Channel):
    """It is the real model: sentences of one meaning are near each other, others are not."""
    texts = ["A mill grinds grain.", "Corn is ground in the mill.", "My phone needs charging."]
    answer = await embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(
        embedding_pb2.EmbedRequest(model="minilm", texts=texts), metadata=mesh.metadata()
    )

    mill, corn, phone = (embedding.values for embedding in answer.embeddings)

    def likeness(one: Sequence[float], other: Sequence[float]) -> float:
        return float(sum(a * b for a, b in zip(one, other, strict=True)))

    assert likeness(mill, corn) > 0.5 > likeness(mill, phone)


async def test_a_job_runs_later_and_is_booked_once(mesh: RunningMesh, channel: grpc.aio.Channel):
    """It is watched to its end, its result is what a call gives, and its cost is in the ledger."""
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    direct = await generate(channel, ask("Name three rivers."), mesh.metadata())
    job_id = str(uuid.uuid4())
    request = jobs_pb2.SubmitJobRequest(
        job_id=job_id, payload=jobs_pb2.JobPayload(generate=ask("Name three rivers."))
    )

    submitted = await stub.SubmitJob(request, metadata=mesh.metadata())
    again = await stub.SubmitJob(request, metadata=mesh.metadata())
    states = []
    job = submitted.job
    watch = jobs_pb2.WatchJobRequest(name=job.name)
    async for answer in stub.WatchJob(watch, metadata=mesh.metadata(), timeout=60):
        job = answer.job
        states.append(job.state)

    assert again.job.name == submitted.job.name == f"jobs/{job_id}"
    assert states[-1] == jobs_pb2.JOB_STATE_SUCCEEDED
    assert job.result.generate.message.parts[0].text == direct.text
    assert job.result.generate.final.request_id == job_id
    cost = await cost_pb2_grpc.CostServiceStub(channel).GetRequestCost(
        cost_pb2.GetRequestCostRequest(request_id=job_id), metadata=mesh.metadata()
    )
    assert cost.cost_nano_usd == job.result.generate.final.cost_nano_usd > 0
    assert len({posting.usage_id for posting in cost.postings}) == 1


async def test_the_router_explains(mesh: RunningMesh, channel: grpc.aio.Channel):
    """It says where a request would go and why, without running it."""
    answer = await router_pb2_grpc.RouterServiceStub(channel).Route(
        router_pb2.RouteRequest(model="smollm2@1.0.0"), metadata=mesh.metadata()
    )

    assert answer.target.model_version == VERSION
    assert answer.target.deployment == "deployments/smollm2"
    assert answer.reason


async def test_one_trace_goes_from_the_edge_to_the_ledger(
    mesh: RunningMesh, channel: grpc.aio.Channel, collector: CollectorThread
):
    """Every hop of a job is in the trace that the edge began, over NATS too."""
    trace_id = uuid.uuid4().hex
    metadata = (*mesh.metadata(), ("traceparent", f"00-{trace_id}-{'1' * 16}-01"))
    request = jobs_pb2.SubmitJobRequest(
        payload=jobs_pb2.JobPayload(generate=ask("Name a colour.", max_tokens=8))
    )
    await jobs_pb2_grpc.JobServiceStub(channel).SubmitJob(request, metadata=metadata)
    hops = {"headrace-edge", "jobs", "worker", "inference", "cost"}

    def is_whole(spans: list[CollectedSpan]) -> bool:
        ours = [span for span in spans if span.trace_id == trace_id]
        ids = {span.span_id for span in ours} | {"1" * 16}
        # Parents end, and are exported, after their children.
        return hops <= {span.service for span in ours} and ids >= {
            span.parent_span_id for span in ours
        }

    await collector.wait_for(is_whole)


async def test_logs_tell_of_requests_but_not_what_they_say(
    mesh: RunningMesh, channel: grpc.aio.Channel
):
    """The line of a request has its trace, tenant and version; no log has its text."""
    secret = f"xyzzy{uuid.uuid4().hex}"
    streamed = await generate(channel, ask(f"Repeat: {secret}"), mesh.metadata())
    final = streamed.final
    await cost_pb2_grpc.CostServiceStub(channel).GetRequestCost(
        cost_pb2.GetRequestCostRequest(request_id=final.request_id), metadata=mesh.metadata()
    )

    logs = {log.stem: log.read_text() for log in mesh.layout.logs.glob("*.log")}

    lines = [line for line in logs["inference"].splitlines() if final.request_id in line]
    assert any(
        final.trace_id in line and VERSION in line and '"acme"' in line and "input_hash" in line
        for line in lines
    )
    assert [name for name, text in logs.items() if secret in text] == []
