"""Attempts at the Tritons of a model, for requests that another backend cannot continue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import structlog
from headrace.common.v1.backend_pb2 import Backend
from opentelemetry import trace

from libs.errors import HeadraceError, InvalidArgument
from libs.routes import Choice, kind_name
from libs.telemetry.tracing import current_trace_id
from services.inference import metrics
from services.inference.backends.pool import Backends, Lease, Suspects
from services.inference.backends.targets import Protocol, target_of
from services.inference.domain import BackendFailedError

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.inference")

MAX_ATTEMPTS = 3

T = TypeVar("T")
Attempt = Callable[[Lease], Awaitable[T]]


class Retrier:
    """Tries one Triton after another."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    async def run(
        self,
        choice: Choice,
        attempt: Attempt[T],
        *,
        may_retry: Callable[[], bool] = lambda: True,
        request_id: str = "",
    ) -> T:
        """Returns the result of the first attempt at which the backend does not fail.

        Args:
            choice: the model.
            attempt: uses the lease's backend, which is a Triton.
            may_retry: called after a failure; False: the caller gets the error.
            request_id: for errors and the log; empty: it has none.

        Raises:
            InvalidArgument: no Triton runs the model, or the request is wrong.
            HeadraceError: the backends failed, or the deadline passed.
        """
        tritons = [backend for backend in choice.target.backends if _is_triton(backend)]
        if not tritons:
            raise kind_mismatch(choice, "a provider runs it, not a Triton")
        failed: frozenset[str] = frozenset()
        suspects = Suspects()
        for attempts in range(1, MAX_ATTEMPTS + 1):
            try:
                with self._backends.lease(tritons, avoid=failed) as lease, _span(lease, choice):
                    try:
                        result = await attempt(lease)
                    except BackendFailedError as error:
                        suspects.note(lease, error)
                        raise
                    suspects.answered_by(lease)
                    return result
            except BackendFailedError as error:
                failed |= error.backends
                for backend in error.backends:
                    metrics.count_failure(choice.model, backend, error.fault)
                _log.warning(
                    "backend failed",
                    backends=sorted(error.backends),
                    request_id=request_id,
                    fault=error.fault.value,
                    error=str(error),
                )
                # With one backend the second try may be in a batch without the other requests.
                if attempts == MAX_ATTEMPTS or suspects.are_enough or not may_retry():
                    raise error.client_error.to_error(
                        failed, request_id=request_id, trace_id=current_trace_id()
                    ) from error
            except HeadraceError as error:
                _hide_backend_names(error, choice)
                raise
        raise AssertionError("the last attempt returns or raises")


def kind_mismatch(choice: Choice, why: str) -> InvalidArgument:
    """Returns the error of a call that does not suit the model."""
    kind = kind_name(choice.target.schema)
    return InvalidArgument(
        f"{choice.model}: {why}",
        reason="MODEL_KIND_MISMATCH",
        metadata={"model": choice.model, "kind": kind},
        field_violations=[("model", why)],
    )


def _is_triton(backend: Backend) -> bool:
    target = target_of(backend)
    return target is not None and target.endpoint.protocol is Protocol.TRITON


def _hide_backend_names(error: HeadraceError, choice: Choice) -> None:
    """Replaces Triton's name of the model by the public one."""
    for backend in choice.target.backends:
        if target := target_of(backend):
            error.message = error.message.replace(target.model, choice.model)
    error.args = (error.message,)


def _span(lease: Lease, choice: Choice) -> AbstractContextManager[trace.Span]:
    return _tracer.start_as_current_span(
        f"triton infer {choice.model}",
        kind=trace.SpanKind.CLIENT,
        attributes={"headrace.backend": lease.backend.status.id},
    )
