"""OpenTelemetry traces: sampling, export, spans, and the ID of the current trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
# W3C Trace Context, version 00, without the flag "sampled".
_UNSAMPLED = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00").fullmatch


def setup_tracing(
    *, service: str, sample_percent: float = 100.0, otlp_endpoint: str | None = None
) -> TracerProvider:
    """Sets the tracer provider and W3C propagation of the process; call it once.

    Call `shutdown()` of the returned provider at the end of the process.

    Args:
        service: becomes `service.name`.
        sample_percent: share of the traces started here that are sampled; other traces follow
            their parent.
        otlp_endpoint: `http://host:port` of a collector for OTLP over gRPC. None: spans have valid
            IDs, which are propagated and logged, and are not exported.

    Raises:
        ValueError: `sample_percent` is not between 0 and 100.
    """
    sampler = _sampler(sample_percent, exported=otlp_endpoint is not None)
    provider = TracerProvider(
        sampler=sampler,
        resource=Resource({"service.name": service, "service.namespace": "headrace"}),
        # Events are recorded exceptions only, whose messages may quote requests.
        span_limits=SpanLimits(max_events=0),
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
    """Returns the ID of the current trace, 32 hexadecimal digits, or an empty string."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def unsampled_context(traceparent: str | None) -> Context | None:
    """Returns the context of the caller's trace if it is unsampled, so that no span is needed."""
    if traceparent is None or not _UNSAMPLED(traceparent):
        return None
    parent_context = trace.SpanContext(
        trace_id=int(traceparent[3:35], 16), span_id=int(traceparent[36:52], 16), is_remote=True
    )
    if not parent_context.is_valid:  # zeros mean none
        return None
    return trace.set_span_in_context(trace.NonRecordingSpan(parent_context))


@contextmanager
def server_span(tracer: trace.Tracer, name: str, headers: Mapping[str, str]) -> Iterator[None]:
    """Continues the trace in the caller's headers with a span, or without one if it is unsampled.

    Exceptions that leave the block do not change the span.
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
    """Makes a span for a block, unless the trace is unsampled.

    Children follow the sampling of their parent, so skipping the span only saves its cost.
    """
    parent = trace.get_current_span(context)
    parent_context = parent.get_span_context()
    if parent_context.is_valid and not parent_context.trace_flags.sampled:
        return nullcontext(parent) if context is None else trace.use_span(parent)
    return tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes)


def _sampler(sample_percent: float, *, exported: bool) -> Sampler:
    ratio = TraceIdRatioBased(sample_percent / 100)
    # Without a collector no span is recorded, which costs only a few microseconds.
    return ParentBased(ratio) if exported else ALWAYS_OFF
