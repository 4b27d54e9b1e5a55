"""Attempts at the Tritons of a model, for what is not generated and therefore not resumed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import structlog
from headrace.common.v1.model_pb2 import BACKEND_KIND_OPENAI
from opentelemetry import trace

from libs.errors import HeadraceError, InvalidArgument
from libs.routes import Choice, kind_name
from services.inference import metrics
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import BackendFailedError

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.inference")

MAX_ATTEMPTS = 3

Attempt = Callable[[Lease], Awaitable[Any]]


class Retrier:
    """Asks one Triton after the other."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    async def run(
        self, choice: Choice, attempt: Attempt, *, may_retry: Callable[[], bool] = lambda: True
    ) -> Any:
        """Returns what the first attempt returns that its backend does not fail.

        Args:
            choice: the model.
            attempt: uses the lease's backend, which is a Triton.
            may_retry: asked when a backend has failed; False: the caller hears of it.

        Raises:
            InvalidArgument: no Triton runs the model, or the request is wrong.
            HeadraceError: the backends failed; it says what the caller hears.
        """
        tritons = [each for each in choice.target.backends if each.kind != BACKEND_KIND_OPENAI]
        if not tritons:
            raise mismatch(choice, "a provider runs it, not a Triton")
        failed: frozenset[str] = frozenset()
        for attempts in range(1, MAX_ATTEMPTS + 1):
            try:
                with self._backends.lease(tritons, avoid=failed) as lease, _span(lease, choice):
                    return await attempt(lease)
            except BackendFailedError as error:
                failed |= error.backends
                for backend in error.backends:
                    metrics.BACKEND_FAILURES.labels(choice.model, backend).inc()
                _log.warning("backend failed", backends=sorted(error.backends), error=str(error))
                if attempts == MAX_ATTEMPTS or not may_retry():
                    raise error.client_error.to_error(failed) from error
            except HeadraceError as error:
                _hide_backend_names(error, choice)
                raise
        raise AssertionError("the last attempt returns or raises")


def mismatch(choice: Choice, why: str) -> InvalidArgument:
    """Returns the error of a call that the model is not for."""
    kind = kind_name(choice.target.schema)
    return InvalidArgument(
        f"{choice.model}: {why}",
        reason="MODEL_KIND_MISMATCH",
        metadata={"model": choice.model, "kind": kind},
        field_violations=[("model", why)],
    )


def _hide_backend_names(error: HeadraceError, choice: Choice) -> None:
    """Puts the public name where a Triton tells the one it knows the model by."""
    for backend in choice.target.backends:
        error.message = error.message.replace(backend.backend_model, choice.model)
    error.args = (error.message,)


def _span(lease: Lease, choice: Choice) -> AbstractContextManager[trace.Span]:
    return _tracer.start_as_current_span(
        f"triton infer {choice.model}",
        kind=trace.SpanKind.CLIENT,
        attributes={"headrace.backend": lease.backend.id},
    )
