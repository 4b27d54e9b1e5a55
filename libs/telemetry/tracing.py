"""OpenTelemetry traces: who samples, where spans go, and the id of the trace at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
# W3C Trace Context, version 00, without the flag "sampled".
_UNSAMPLED = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00").fullmatch


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
    propagate.set_global_textmap(_PROPAGATOR)
    return provider


def current_trace_id() -> str:
    """Returns the id of the trace at hand, 32 hexadecimal digits, or an empty string."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def unsampled_context(traceparent: str | None) -> Context | None:
    """Returns the caller's trace where it says that nobody keeps it; then a span is of no use."""
    if traceparent is None or not _UNSAMPLED(traceparent):
        return None
    told = trace.SpanContext(
        trace_id=int(traceparent[3:35], 16), span_id=int(traceparent[36:52], 16), is_remote=True
    )
    if not told.is_valid:  # zeros stand for none
        return None
    return trace.set_span_in_context(trace.NonRecordingSpan(told))


@contextmanager
def server_span(tracer: trace.Tracer, name: str, headers: Mapping[str, str]) -> Iterator[None]:
    """Continues the trace in the caller's headers with a span, or without one if it is unsampled.

    An exception that leaves the block changes nothing in the span.
    """
    unsampled = unsampled_context(headers.get("traceparent"))
    if unsampled is not None:
        token = attach(unsampled)
        try:
            yield
        finally:
            detach(token)
        return
    with tracer.start_as_current_span(
        name,
        context=_PROPAGATOR.extract(headers),
        kind=trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    ):
        yield


def child_span(
    tracer: trace.Tracer,
    name: str,
    *,
    kind: trace.SpanKind,
    attributes: Mapping[str, str | int],
    context: Context | None = None,
) -> AbstractContextManager[trace.Span]:
    """Makes a span of what a block does; inside a trace that nobody keeps, none is made.

    Children follow their parent, so nothing is lost, and the request is spared what spans cost.
    """
    parent = trace.get_current_span(context)
    told = parent.get_span_context()
    if told.is_valid and not told.trace_flags.sampled:
        return nullcontext(parent) if context is None else trace.use_span(parent)
    return tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes)


def _sampler(sample_percent: float, *, exported: bool) -> Sampler:
    ratio = TraceIdRatioBased(sample_percent / 100)
    # Without a collector no span is recorded: what is left costs a few microseconds.
    return ParentBased(ratio) if exported else ALWAYS_OFF
