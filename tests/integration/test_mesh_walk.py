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
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

from deploy.triton.artifact import bundled_version
from libs.chat.wire import text_message
from libs.model_reference import at_version, version_name
from tests.support.mesh import CollectorThread, RunningMesh
from tests.support.otlp import CollectedSpan

pytestmark = pytest.mark.integration

VERSION = version_name("smollm2", bundled_version("smollm2"))
LEDGER_SECONDS = 15.0


@dataclass
class Streamed:
    """What came of one `Generate`.

    Attributes:
        arrivals: seconds from the call to each message.
        events: their kinds.
        tokens: of each delta the length of the text after it, and its resume token.
    """

    text: str = ""
    token_count: int = 0
    arrivals: list[float] = field(default_factory=list)
    finals: list[inference_pb2.Final] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    started: inference_pb2.Started | None = None
    tokens: list[tuple[int, str]] = field(default_factory=list)

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
        messages=[text_message(inference_pb2.ROLE_USER, question)], **fields
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
        event = message.WhichOneof("event")
        streamed.events.append(str(event))
        if event == "final":
            streamed.finals.append(message.final)
        elif event == "started":
            streamed.started = message.started
        else:
            streamed.text += message.delta.text
            streamed.token_count += message.delta.token_count
            streamed.tokens.append((len(streamed.text), message.delta.resume_token))
    return streamed


async def test_an_answer_streams_token_by_token(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Tokens come as the model makes them, then one final message with usage, cost and version."""
    request = ask("Why is the sky blue?", request_id=str(uuid.uuid4()))

    streamed = await generate(channel, request, mesh.metadata())

    final = streamed.final
    assert streamed.events == ["started", *["delta"] * (len(streamed.events) - 2), "final"]
    assert streamed.started == inference_pb2.Started(
        request_id=final.request_id,
        trace_id=final.trace_id,
        route=final.route,
        model_version=final.model_version,
        artifact_digest=final.artifact_digest,
    )
    assert streamed.text.strip()
    assert final.finish_reason in {
        inference_pb2.FINISH_REASON_STOP,
        inference_pb2.FINISH_REASON_LENGTH,
    }
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
    assert final.time_to_first_token.ToTimedelta().total_seconds() <= streamed.arrivals[0] + 0.001


async def test_greedy_answers_repeat(mesh: RunningMesh, channel: grpc.aio.Channel):
    """The same question has the same answer, and what was computed for it is not computed again."""
    first = await generate(channel, ask("Name three rivers."), mesh.metadata())
    second = await generate(channel, ask("Name three rivers."), mesh.metadata())

    assert second.text == first.text
    assert second.final.usage.cached_tokens > 0


async def test_an_answer_continues_after_any_delta(mesh: RunningMesh, channel: grpc.aio.Channel):
    """With the token of that delta: the rest of the same text, of which only the rest is billed."""
    request = ask("Name three rivers.")
    complete = await generate(channel, request, mesh.metadata())
    for length, token in (complete.tokens[0], complete.tokens[4], complete.tokens[-1]):
        request.resume_from = token
        rest = await generate(channel, request, mesh.metadata())
        assert rest.text == complete.text[length:]
        assert rest.final.usage.completion_tokens == rest.token_count
        assert [each for each in rest.tokens if each[1] == complete.tokens[-1][1]] or not rest.text


async def test_a_token_of_another_request_is_refused(mesh: RunningMesh, channel: grpc.aio.Channel):
    """It says nothing about this answer."""
    first = await generate(channel, ask("Name three rivers.", max_tokens=4), mesh.metadata())
    for request in (
        ask("Name three lakes.", resume_from=first.tokens[0][1]),
        ask("Name three rivers.", temperature=0.5, seed=1, resume_from=first.tokens[0][1]),
        ask("Name three rivers.", resume_from="3"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel, request, mesh.metadata())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "resume_from" in (caught.value.details() or "")


async def test_answers_that_run_together_do_not_mix(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Requests share the engine's batches; each gets the answer that it gets alone."""
    questions = ["Name three rivers.", "What is two plus two?", "Who wrote Hamlet?"]
    alone = [await generate(channel, ask(q), mesh.metadata()) for q in questions]

    together = await asyncio.gather(
        *(generate(channel, ask(q), mesh.metadata()) for q in questions * 2)
    )

    assert [s.text for s in together] == [s.text for s in alone] * 2


async def test_cost_is_the_same_everywhere(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Reported, booked, posted and summed up: the same, of every kind of token."""
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
        cost_pb2.QueryUsageRequest(filter='model = "smollm2"', start_time=since), metadata=metadata
    )

    for final, cost in zip(finals, booked, strict=True):
        assert final.cost_nano_usd > 0
        assert cost.cost_nano_usd == final.cost_nano_usd
        assert sum(posting.cost_nano_usd for posting in cost.postings) == final.cost_nano_usd
        quantities = {posting.usage_kind: posting.quantity for posting in cost.postings}
        cached = final.usage.cached_tokens
        expected = {
            usage_pb2.USAGE_KIND_PROMPT_TOKENS: final.usage.prompt_tokens - cached,
            usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS: cached,
            usage_pb2.USAGE_KIND_COMPLETION_TOKENS: final.usage.completion_tokens,
        }
        assert quantities == {kind: quantity for kind, quantity in expected.items() if quantity}
        assert (cost.tenant, cost.user, cost.model_version) == (f"tenants/{tenant}", "bob", VERSION)
    (row,) = usage.rows
    assert (row.tenant, row.user, row.model) == (f"tenants/{tenant}", "bob", "smollm2")
    assert row.totals == usage.totals
    assert row.totals.request_count == len(finals)
    assert row.totals.cost_nano_usd == sum(final.cost_nano_usd for final in finals)
    completion_tokens = sum(final.usage.completion_tokens for final in finals)
    assert row.totals.usage.completion_tokens == completion_tokens


async def test_a_tenant_sees_only_its_own_costs(mesh: RunningMesh, channel: grpc.aio.Channel):
    """Neither the cost of a request nor sums of another tenant."""
    streamed = await generate(channel, ask("Name a colour."), mesh.metadata())
    stub = cost_pb2_grpc.CostServiceStub(channel)
    stranger = mesh.metadata(tenant="stranger", user="eve", scopes="infer read")

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetRequestCost(
            cost_pb2.GetRequestCostRequest(request_id=streamed.final.request_id), metadata=stranger
        )
    usage = await stub.QueryUsage(cost_pb2.QueryUsageRequest(), metadata=stranger)

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert {row.tenant for row in usage.rows} <= {"tenants/stranger"}


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
    """It returns where a request would be sent and why, without running it."""
    answer = await router_pb2_grpc.RouterServiceStub(channel).Route(
        router_pb2.RouteRequest(model=at_version("smollm2", bundled_version("smollm2"))),
        metadata=mesh.metadata(),
    )

    assert answer.model_version == VERSION
    assert answer.route.deployment == "deployments/smollm2"
    assert answer.route.reason
    assert answer.route.epoch
    assert [backend.id for backend in answer.backends] == ["triton-0"]


async def test_one_trace_spans_edge_to_ledger(
    mesh: RunningMesh, channel: grpc.aio.Channel, collector: CollectorThread
):
    """Every hop of a job is in the trace that the edge started, also over NATS."""
    trace_id = uuid.uuid4().hex
    metadata = (*mesh.metadata(), ("traceparent", f"00-{trace_id}-{'1' * 16}-01"))
    request = jobs_pb2.SubmitJobRequest(
        payload=jobs_pb2.JobPayload(generate=ask("Name a colour.", max_tokens=8))
    )
    await jobs_pb2_grpc.JobServiceStub(channel).SubmitJob(request, metadata=metadata)
    hops = {"headrace-edge", "jobs", "worker", "inference", "cost"}

    def is_complete(spans: list[CollectedSpan]) -> bool:
        own_spans = [span for span in spans if span.trace_id == trace_id]
        ids = {span.span_id for span in own_spans} | {"1" * 16}
        # Parents end, and are exported, after their children.
        return hops <= {span.service for span in own_spans} and ids >= {
            span.parent_span_id for span in own_spans
        }

    await collector.wait_for(is_complete)


async def test_logs_have_requests_but_not_their_texts(mesh: RunningMesh, channel: grpc.aio.Channel):
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
