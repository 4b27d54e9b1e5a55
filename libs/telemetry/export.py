"""Sends spans to a collector; imported only if there is one."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status
from prometheus_client import Counter, Gauge
from typing_extensions import override

# Spans that wait for export; more are dropped, the oldest first.
SPAN_QUEUE_LIMIT = 8192
SPAN_BATCH_LIMIT = 512
SPAN_EXPORT_INTERVAL_MILLIS = 1000
# Limit for one export, including its retries.
SPAN_EXPORT_TIMEOUT_SECONDS = 2
# How long a process waits for the collector at its end. The default of OpenTelemetry is 30 seconds.
SHUTDOWN_TIMEOUT_MILLIS = 2000

_WAITING = Gauge("headrace_telemetry_spans_waiting", "Spans that wait for export.")
_DROPPED = Counter("headrace_telemetry_spans_dropped", "Spans dropped because too many waited.")


class SpanExport(BatchSpanProcessor):
    """Sends spans in batches from its own thread; counts dropped spans.

    What is sent has no messages of errors.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(
            OTLPSpanExporter(endpoint=endpoint, timeout=SPAN_EXPORT_TIMEOUT_SECONDS),
            max_queue_size=SPAN_QUEUE_LIMIT,
            max_export_batch_size=SPAN_BATCH_LIMIT,
            schedule_delay_millis=SPAN_EXPORT_INTERVAL_MILLIS,
        )
        self._waiting = self._batch_processor._queue  # noqa: SLF001  # not public
        _WAITING.set_function(lambda: len(self._waiting))

    @override
    def on_end(self, span: ReadableSpan) -> None:
        if len(self._waiting) == SPAN_QUEUE_LIMIT:
            _DROPPED.inc()
        if span.status.description:  # the message of an exception, which may quote a request
            span._status = Status(span.status.status_code)  # noqa: SLF001  # not public
        super().on_end(span)

    @override
    def shutdown(self) -> None:
        self._batch_processor.shutdown(timeout_millis=SHUTDOWN_TIMEOUT_MILLIS)
