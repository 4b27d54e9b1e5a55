"""The backends that the routes name: their connections, their load and which one a request gets."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import structlog
from headrace.common.v1.backend_pb2 import Backend

from libs.clock import Clock
from libs.errors import InvalidArgument
from libs.http_client import Network
from libs.routes import RouteTable
from libs.tls import TlsFiles
from services.inference import metrics
from services.inference.backends.breaker import Breaker, BreakerLimits, Permit
from services.inference.backends.chat import ChatBackend
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.client import Provider
from services.inference.backends.stall import StallLimits
from services.inference.backends.targets import Endpoint, Protocol, Target, target_of
from services.inference.backends.triton.client import Triton
from services.inference.domain import (
    BACKENDS_FAILED,
    MAX_MODEL_FAILURES,
    BackendFailedError,
    ClientError,
    Fault,
)

_log = structlog.get_logger()

# A Triton that is restarted is back within seconds, and streams wait for it.
TRITON_BREAKER = BreakerLimits(open_seconds=0.25, max_open_seconds=2.0)
# A provider has other customers: the longer it fails, the less often it is called.
PROVIDER_BREAKER = BreakerLimits(open_seconds=1.0, max_open_seconds=30.0)


@dataclass
class _ServedModel:
    """One model at one endpoint, with its last failure."""

    breaker: Breaker
    client_error: ClientError = BACKENDS_FAILED
    attempts: int | None = None


@dataclass
class _Connection:
    """The client of one endpoint; its models share the load."""

    client: Triton | Provider
    in_flight: int = 0
    models: dict[str, _ServedModel] = field(default_factory=dict)


class _Candidate(NamedTuple):
    backend: Backend
    target: Target
    connection: _Connection
    served: _ServedModel


class Lease:
    """A backend for one attempt. How its block ends is reported to the backend's breaker.

    Attributes:
        backend: as the route names it.
        target: how it is called.
    """

    def __init__(self, candidate: _Candidate, permit: Permit, clock: Clock) -> None:
        self.backend = candidate.backend
        self.target = candidate.target
        self._connection = candidate.connection
        self._served = candidate.served
        self._permit = permit
        self._clock = clock
        self._succeeded = False

    @property
    def chat(self) -> ChatBackend:
        """The backend, as one that generates answers."""
        return self._connection.client

    @property
    def triton(self) -> Triton:
        """The backend, where only a Triton can do the work.

        Raises:
            BackendFailedError: it is a provider.
        """
        if not isinstance(self._connection.client, Triton):
            raise BackendFailedError(f"{self.backend.status.id} is a provider, not a Triton")
        return self._connection.client

    def report_success(self) -> None:
        """Reports to the breaker that the backend works, before the block ends.

        A probe has succeeded with its first token: it need not wait for the end of the answer.
        """
        if not self._succeeded:
            self._succeeded = True
            self._served.breaker.succeeded(self._permit)

    def __enter__(self) -> Self:
        self._connection.in_flight += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.in_flight -= 1
        if isinstance(error, BackendFailedError):
            error.backends |= {self.backend.status.id}
        if isinstance(error, BackendFailedError) and error.fault is Fault.BACKEND:
            self.report_failure(error)
        elif error is None or isinstance(error, InvalidArgument):
            self.report_success()
        elif not self._succeeded:
            # The caller left, its deadline passed, the backend is busy, or the model failed on this
            # request: `Suspects` reports it if it turns out to be the backend's fault.
            self._served.breaker.abandoned(self._permit)

    def report_failure(self, error: BackendFailedError) -> None:
        """Reports a failure to the breaker; callers get its error while the breaker is open."""
        self._served.client_error, self._served.attempts = error.client_error, error.attempts
        self._served.breaker.failed(
            self._permit,
            self._clock.monotonic_seconds(),
            retry_after_seconds=error.retry_after_seconds,
        )


class Suspects:
    """The backends whose model failed on one request, which may be the fault of either.

    A request's own fault must not open the breaker for others: one tenant could refuse a model to
    all. So a model's failure (an exception in its code, an error of its engine) counts only where
    there is proof: *another backend of the same version has answered the same request*. A backend
    whose model is broken fails on what others can answer, and is found with its first few requests;
    a request that no backend can answer is its own fault, however often and by whomever it is sent.
    Where a version has one backend there is nothing to compare with, and its breaker stays closed:
    open, it would only turn one error into another. `headrace_inference_model_failures` shows it.

    Crashes, broken streams, silence and unreachable backends count immediately, without this class.
    """

    def __init__(self) -> None:
        self._suspected: list[Lease] = []

    def note(self, lease: Lease, error: BackendFailedError) -> None:
        """Called when a backend failed on the request, for whatever reason."""
        if error.fault is Fault.REQUEST_OR_BACKEND:
            self._suspected.append(lease)

    def answered_by(self, lease: Lease) -> None:
        """Called when a backend has answered the request: the others are at fault."""
        for suspected in self._suspected:
            if suspected.backend.status.id != lease.backend.status.id:
                suspected.report_failure(
                    BackendFailedError("its model fails on a request that another backend answers")
                )
        self._suspected.clear()

    @property
    def are_enough(self) -> bool:
        """Whether so many backends have failed that the request is not tried again."""
        return len(self._suspected) >= MAX_MODEL_FAILURES


class Backends:
    """Connections to the backends of the routes, with their requests in flight and breakers."""

    def __init__(
        self,
        *,
        clock: Clock,
        keys: ApiKeys,
        stall: StallLimits,
        network: Network | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._stall = stall
        self._network = network
        self._tls = tls
        self._connections: dict[Endpoint, _Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unknown: frozenset[tuple[str, str]] = frozenset()

    def lease(
        self, candidates: Sequence[Backend], *, avoid: Collection[str] = frozenset()
    ) -> Lease:
        """Picks the backend with the fewest requests in flight; those to avoid come last.

        Use it with `with`, immediately: it holds a permit of the backend's breaker.

        Args:
            candidates: at least one of a known kind, see `callable_routes`.
            avoid: ids of backends at which this request failed before.

        Raises:
            BackendFailedError: the breakers of all are open.
        """
        now = self._clock.monotonic_seconds()
        found = [
            self._find(backend, target) for backend in candidates if (target := target_of(backend))
        ]
        available = [each for each in found if each.served.breaker.has_permit(now)]
        if available:
            picked = min(
                available,
                key=lambda each: (each.backend.status.id in avoid, each.connection.in_flight),
            )
            permit = picked.served.breaker.permit(now)
            assert permit is not None  # noqa: S101  # `has_permit` said so
            return Lease(picked, permit, self._clock)
        raise self._all_open(found, now)

    def callable_routes(self, routes: RouteTable) -> RouteTable:
        """Returns the routes without the backends whose kind this service does not know.

        Such a backend comes from a newer registry. It is logged once and counted in a gauge. A
        model that has no other backends is not ready (`MODEL_NOT_READY`).
        """
        unknown = frozenset(
            (target.deployment, backend.status.id)
            for target in routes.targets()
            for backend in target.backends
            if target_of(backend) is None
        )
        for deployment, backend_id in sorted(unknown - self._unknown):
            _log.error(
                "a backend of an unknown kind is skipped: update this service",
                deployment=deployment,
                backend=backend_id,
            )
        self._unknown = unknown
        metrics.UNKNOWN_BACKENDS.set(len(unknown))
        if not unknown:
            return routes
        return routes.with_backends(lambda backend: target_of(backend) is not None)

    def retain(self, backends: Iterable[Backend]) -> None:
        """Closes the connections to all but these, except where a request still runs."""
        targets = (target_of(backend) for backend in backends)
        retained = {target.endpoint for target in targets if target is not None}
        for endpoint, connection in list(self._connections.items()):
            if endpoint not in retained and connection.in_flight == 0:
                del self._connections[endpoint]
                for model in connection.models:
                    metrics.BREAKER_STATE.remove(endpoint.address, model)
                task = asyncio.create_task(connection.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes all connections."""
        clients = [connection.client.close() for connection in self._connections.values()]
        await asyncio.gather(*clients, *self._closing)

    def _find(self, backend: Backend, target: Target) -> _Candidate:
        connection = self._connections.get(target.endpoint)
        if connection is None:
            connection = _Connection(self._open(target.endpoint))
            self._connections[target.endpoint] = connection
        served = connection.models.get(target.model)
        if served is None:
            served = connection.models[target.model] = self._serve(target)
        return _Candidate(backend, target, connection, served)

    def _open(self, endpoint: Endpoint) -> Triton | Provider:
        if endpoint.protocol is Protocol.OPENAI:
            return Provider(
                endpoint.address,
                api_key_name=endpoint.api_key_name,
                keys=self._keys,
                stall=self._stall,
                clock=self._clock,
                network=self._network,
            )
        return Triton(endpoint.address, stall=self._stall, clock=self._clock, tls=self._tls)

    def _serve(self, target: Target) -> _ServedModel:
        is_provider = target.endpoint.protocol is Protocol.OPENAI
        breaker = Breaker(PROVIDER_BREAKER if is_provider else TRITON_BREAKER)
        # Computed when it is scraped: the state changes with time alone.
        metrics.BREAKER_STATE.labels(target.endpoint.address, target.model).set_function(
            lambda: breaker.state(self._clock.monotonic_seconds())
        )
        return _ServedModel(breaker)

    def _all_open(self, found: Sequence[_Candidate], now_seconds: float) -> BackendFailedError:
        """Returns the last failure of the backend that may be called again first."""
        if not found:
            return BackendFailedError("no backend is of a known kind", attempts=1)
        soonest = min(found, key=lambda each: each.served.breaker.wait_seconds(now_seconds)).served
        wait_seconds = soonest.breaker.wait_seconds(now_seconds)
        error = BackendFailedError(
            f"the breakers of all backends are open, for at least {wait_seconds:.3f} s",
            client_error=soonest.client_error.retry_after(wait_seconds),
            attempts=soonest.attempts,
        )
        error.backends = frozenset(each.backend.status.id for each in found)
        return error
