"""An OTLP collector that stores spans in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from typing_extensions import override

WAIT_SECONDS = 15.0


@dataclass(frozen=True)
class CollectedSpan:
    """A received span; IDs in hexadecimal.

    Attributes:
        serialized: the whole span in protobuf, with events and status.
    """

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str
    attributes: dict[str, str | int | float | bool]
    serialized: bytes = b""

    @classmethod
    def of(cls, service: str, span: trace_pb2.Span) -> CollectedSpan:
        values = {
            item.key: getattr(item.value, str(item.value.WhichOneof("value")))
            for item in span.attributes
        }
        return cls(
            service=service,
            name=span.name,
            kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex(),
            attributes=values,
            serialized=span.SerializeToString(),
        )


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Stores spans in the order of arrival.

    Attributes:
        endpoint: value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[CollectedSpan] = []
        self._came = asyncio.Condition()

    @override
    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        async with self._came:
            for resource_spans in request.resource_spans:
                named = {
                    item.key: item.value.string_value for item in resource_spans.resource.attributes
                }
                for scope_spans in resource_spans.scope_spans:
                    self.spans += [
                        CollectedSpan.of(named.get("service.name", ""), span)
                        for span in scope_spans.spans
                    ]
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    async def wait_for(self, wanted: Callable[[list[CollectedSpan]], bool]) -> list[CollectedSpan]:
        """Waits until the spans meet the condition, and returns them."""
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._came:
                await self._came.wait_for(lambda: wanted(self.spans))
        except TimeoutError as error:
            names = [f"{span.service}: {span.name}" for span in self.spans]
            raise AssertionError(f"received spans: {names}") from error
        return self.spans


@asynccontextmanager
async def running_collector() -> AsyncIterator[Collector]:
    """Runs a collector on a free port."""
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(grace=None)
