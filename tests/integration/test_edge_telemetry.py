"""What the edge records for a call: one span, one log line, one count."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from tests.support.otlp import CollectedSpan, Collector, running_collector
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_PARENT_ID = "b7ad6b7169203331"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with running_collector() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory, collector: Collector) -> AsyncIterator[ScriptedMesh]:
    home = tmp_path_factory.mktemp("edge")
    async with scripted_mesh(home, otlp_endpoint=collector.endpoint) as running:
        yield running


async def _generate(mesh: ScriptedMesh, *metadata: tuple[str, str]) -> dict[str, Any]:
    """Returns the metadata with which the call reached the service."""
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    call = stub.Generate(
        inference_pb2.GenerateRequest(), metadata=(*mesh.edge.metadata(), *metadata)
    )
    _ = [message async for message in call]
    return mesh.inference.metadata


def _edge_spans(spans: list[CollectedSpan], trace_id: str) -> list[CollectedSpan]:
    return [s for s in spans if s.service == "headrace-edge" and s.trace_id == trace_id]


async def test_a_trace_starts_at_the_edge(mesh: ScriptedMesh, collector: Collector) -> None:
    """The service gets the edge's span as its parent, and the collector gets that span."""
    _, trace_id, span_id, flags = (await _generate(mesh))["traceparent"].split("-")
    assert flags == "01"
    spans = await collector.wait_for(lambda spans: bool(_edge_spans(spans, trace_id)))
    (span,) = _edge_spans(spans, trace_id)
    assert span.span_id == span_id
    assert (span.name, span.kind) == ("headrace.inference.v1.InferenceService/Generate", "SERVER")
    assert span.parent_span_id == ""


async def test_the_trace_of_a_caller_is_continued(mesh: ScriptedMesh, collector: Collector) -> None:
    """The W3C context is read and passed on."""
    metadata = await _generate(mesh, ("traceparent", f"00-{_TRACE_ID}-{_PARENT_ID}-01"))
    assert metadata["traceparent"].split("-")[1] == _TRACE_ID
    spans = await collector.wait_for(lambda spans: bool(_edge_spans(spans, _TRACE_ID)))
    (span,) = _edge_spans(spans, _TRACE_ID)
    assert span.parent_span_id == _PARENT_ID
    assert metadata["traceparent"].split("-")[2] == span.span_id


async def test_a_trace_that_the_caller_does_not_sample_is_not_exported(
    mesh: ScriptedMesh, collector: Collector
) -> None:
    """The caller's decision holds for the whole trace."""
    unsampled = _TRACE_ID[::-1]
    metadata = await _generate(mesh, ("traceparent", f"00-{unsampled}-{_PARENT_ID}-00"))
    assert metadata["traceparent"].split("-")[1::2] == [unsampled, "00"]
    _, after, _, _ = (await _generate(mesh))["traceparent"].split("-")
    spans = await collector.wait_for(lambda spans: bool(_edge_spans(spans, after)))
    assert _edge_spans(spans, unsampled) == []


async def test_the_share_of_sampled_traces_is_a_setting(tmp_path, collector: Collector) -> None:
    """With 0 percent nothing is exported, but the ids are created."""
    settings = {"otlp_endpoint": collector.endpoint, "trace_sample_percent": 0.0}
    async with scripted_mesh(tmp_path, **settings) as mesh:
        assert (await _generate(mesh))["traceparent"].endswith("-00")


async def test_a_call_is_one_line_of_log_without_secrets(mesh: ScriptedMesh) -> None:
    """Caller, method, duration and trace, without token, query and body."""
    token = mesh.edge.token(tenant="globex")
    headers = {"authorization": f"Bearer {token}"}
    before = len(await mesh.edge.requests_logged(0))
    body = {"messages": [{"content": "private"}]}
    path = "/v1/chat/completions?secret=1"
    async with mesh.http.post(path, json=body, headers=headers) as response:
        assert response.status == 200
        await response.read()  # to its end, where the status comes
    line = (await mesh.edge.requests_logged(before + 1))[before]
    expected = {
        "event": "request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "protocol": "HTTP/1.1",
        "status": 200,
        "tenant": "globex",
    }
    assert expected.items() <= line.items()
    assert len(line["trace_id"]) == 32
    assert line["duration_ms"] >= 0
    written = mesh.edge.log.read_text()
    assert token not in written
    assert "secret" not in written
    assert "private" not in written


async def test_refused_calls_are_logged_with_their_cause(mesh: ScriptedMesh) -> None:
    """The log has the details that the caller does not get."""
    before = len(await mesh.edge.requests_logged(0))
    with pytest.raises(grpc.aio.AioRpcError):
        await mesh.channel.unary_unary(GENERATE_PATH, bytes, bytes)(b"")
    line = (await mesh.edge.requests_logged(before + 1))[before]
    assert line["grpc_status"] == "UNAUTHENTICATED"
    assert line["details"] == "jwt_authn_access_denied{Jwt_is_missing}"


async def test_calls_are_counted_by_method_and_unknown_ones_are_not(mesh: ScriptedMesh) -> None:
    """Prometheus finds the results of each method; unknown method names take no memory."""
    await _generate(mesh)
    with pytest.raises(grpc.aio.AioRpcError):
        await mesh.channel.unary_unary("/made.up.Service/Method", bytes, bytes)(
            b"", metadata=mesh.edge.metadata()
        )
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{mesh.edge.admin}/stats/prometheus") as response,
    ):
        metrics = await response.text()
    counted = [
        line
        for line in metrics.splitlines()
        if line.startswith("envoy_cluster_grpc_success{") and "Generate" in line
    ]
    assert len(counted) == 1, metrics[:2000]
    assert "InferenceService" in counted[0]
    assert "made" not in metrics
