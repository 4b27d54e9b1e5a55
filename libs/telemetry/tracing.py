"""OpenTelemetry traces: who samples, where spans go, and the id of the trace at hand."""

from __future__ import annotations

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator


def setup_tracing(
    *, service: str, sample_percent: float = 100.0, otlp_endpoint: str | None = None
) -> TracerProvider:
    """Sets the process's tracer provider and W3C propagation; call it once, `shutdown()` it last.

    Args:
        service: becomes `service.name`.
        sample_percent: share of the traces that begin here that are kept; those that began
            elsewhere follow their parent.
        otlp_endpoint: `http://host:port` of a collector that speaks OTLP over gRPC. None: spans
            have valid ids that are carried on and logged, and nothing else.

    Raises:
        ValueError: `sample_percent` is not between 0 and 100.
    """
    sampler = _sampler(sample_percent, exported=otlp_endpoint is not None)
    provider = TracerProvider(
        sampler=sampler,
        resource=Resource({"service.name": service, "service.namespace": "headrace"}),
        shutdown_on_exit=False,
    )
    if otlp_endpoint is not None:
        # Imported here: a process without a collector does not pay for the exporter's memory.
        from libs.telemetry.export import SpanExport  # noqa: PLC0415  # see above

        provider.add_span_processor(SpanExport(otlp_endpoint))
    trace.set_tracer_provider(provider)
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    return provider


def current_trace_id() -> str:
    """Returns the id of the trace at hand, 32 hexadecimal digits, or an empty string."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def _sampler(sample_percent: float, *, exported: bool) -> Sampler:
    ratio = TraceIdRatioBased(sample_percent / 100)
    # Without a collector no span is recorded: what is left costs a few microseconds.
    return ParentBased(ratio) if exported else ALWAYS_OFF
