"""The backends in reach and which of them a request takes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from headrace.common.v1.model_pb2 import Backend, BackendKind

from libs.clock import Clock
from libs.errors import InvalidArgument
from libs.http_client import Network
from services.inference import metrics
from services.inference.backends.breaker import Breaker, BreakerLimits, Permit
from services.inference.backends.chat import ChatBackend
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.client import Provider
from services.inference.backends.stall import StallLimits
from services.inference.backends.triton import Triton
from services.inference.domain import (
    BACKENDS_FAILED,
    BackendFailedError,
    ClientError,
)

# A Triton that was restarted is back within seconds, and streams wait for it.
TRITON_BREAKER = BreakerLimits(open_seconds=0.25, max_open_seconds=2.0)
# A provider has other customers: the longer it fails, the less it is asked.
PROVIDER_BREAKER = BreakerLimits(open_seconds=1.0, max_open_seconds=30.0)


class _Address(NamedTuple):
    kind: BackendKind.ValueType
    address: str
    api_key_name: str

    @classmethod
    def of(cls, backend: Backend) -> _Address:
        kind = backend.kind or BackendKind.BACKEND_KIND_TRITON
        return cls(kind, backend.address, backend.api_key_name)


@dataclass
class _Served:
    """One model at one address."""

    breaker: Breaker
    client_error: ClientError = BACKENDS_FAILED
    attempts: int | None = None


@dataclass
class _Endpoint:
    """One address: what it can take is shared by its models."""

    client: Triton | Provider
    in_flight: int = 0
    served: dict[str, _Served] = field(default_factory=dict)


class Lease:
    """A backend for one attempt. How the block ends tells the breaker how the backend is."""

    def __init__(
        self, backend: Backend, endpoint: _Endpoint, served: _Served, permit: Permit, clock: Clock
    ) -> None:
        self.backend = backend
        self._endpoint = endpoint
        self._served = served
        self._permit = permit
        self._clock = clock
        self._told_well = False

    @property
    def chat(self) -> ChatBackend:
        """The backend, to generate with."""
        return self._endpoint.client

    @property
    def triton(self) -> Triton:
        """The backend, where only a Triton will do.

        Raises:
            BackendFailedError: it is none.
        """
        if not isinstance(self._endpoint.client, Triton):
            raise BackendFailedError(f"{self.backend.id} is no Triton")
        return self._endpoint.client

    def works(self) -> None:
        """The backend has begun to answer: a probe need not wait for the end of a long answer."""
        if not self._told_well:
            self._told_well = True
            self._served.breaker.succeeded(self._permit)

    def __enter__(self) -> Self:
        self._endpoint.in_flight += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._endpoint.in_flight -= 1
        if isinstance(error, BackendFailedError):
            self._failed(error)
        elif error is None or isinstance(error, InvalidArgument):
            self.works()
        elif not self._told_well:
            self._served.breaker.abandoned(self._permit)

    def _failed(self, error: BackendFailedError) -> None:
        error.backends |= {self.backend.id}
        self._served.client_error, self._served.attempts = error.client_error, error.attempts
        self._served.breaker.failed(
            self._permit,
            self._clock.monotonic_seconds(),
            retry_after_seconds=error.retry_after_seconds,
        )


class Backends:
    """Connections to the backends of the routes, with their requests in flight and breakers."""

    def __init__(
        self, *, clock: Clock, keys: ApiKeys, stall: StallLimits, network: Network | None = None
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._stall = stall
        self._network = network
        self._endpoints: dict[_Address, _Endpoint] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def lease(
        self, candidates: Sequence[Backend], *, avoid: Collection[str] = frozenset()
    ) -> Lease:
        """Picks the backend with the fewest requests of ours; those to avoid come last.

        Use it with `with`, at once: a permit of a breaker goes with it.

        Args:
            candidates: at least one.
            avoid: ids of backends that failed this request before.

        Raises:
            BackendFailedError: the breakers of all are open.
        """
        now = self._clock.monotonic_seconds()
        found = [(backend, *self._find(backend)) for backend in candidates]
        willing = [one for one in found if one[2].breaker.has_permit(now)]
        if willing:
            backend, endpoint, served = min(
                willing, key=lambda one: (one[0].id in avoid, one[1].in_flight)
            )
            permit = served.breaker.permit(now)
            assert permit is not None  # noqa: S101  # `has_permit` said so
            return Lease(backend, endpoint, served, permit, self._clock)
        raise self._none_willing(found, now)

    def retain(self, backends: Iterable[Backend]) -> None:
        """Closes the connections to all but these, where no request runs."""
        kept = {_Address.of(backend) for backend in backends}
        for address, endpoint in list(self._endpoints.items()):
            if address not in kept and endpoint.in_flight == 0:
                del self._endpoints[address]
                for model in endpoint.served:
                    metrics.BREAKER_STATE.remove(address.address, model)
                task = asyncio.create_task(endpoint.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes all connections."""
        clients = [endpoint.client.close() for endpoint in self._endpoints.values()]
        await asyncio.gather(*clients, *self._closing)

    def _find(self, backend: Backend) -> tuple[_Endpoint, _Served]:
        address = _Address.of(backend)
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            endpoint = self._endpoints[address] = _Endpoint(self._open(address))
        served = endpoint.served.get(backend.backend_model)
        if served is None:
            served = self._serve(address, backend.backend_model)
            endpoint.served[backend.backend_model] = served
        return endpoint, served

    def _open(self, address: _Address) -> Triton | Provider:
        if address.kind == BackendKind.BACKEND_KIND_OPENAI:
            return Provider(
                address.address,
                api_key_name=address.api_key_name,
                keys=self._keys,
                stall=self._stall,
                clock=self._clock,
                network=self._network,
            )
        return Triton(address.address, stall=self._stall)

    def _serve(self, address: _Address, model: str) -> _Served:
        is_provider = address.kind == BackendKind.BACKEND_KIND_OPENAI
        breaker = Breaker(PROVIDER_BREAKER if is_provider else TRITON_BREAKER)
        # Asked when it is scraped: it changes with time alone.
        metrics.BREAKER_STATE.labels(address.address, model).set_function(
            lambda: breaker.state(self._clock.monotonic_seconds())
        )
        return _Served(breaker)

    def _none_willing(
        self, found: Sequence[tuple[Backend, _Endpoint, _Served]], now_seconds: float
    ) -> BackendFailedError:
        """Returns the failure that the backend had which is tried again first."""
        soonest = min(
            (one[2] for one in found), key=lambda one: one.breaker.wait_seconds(now_seconds)
        )
        wait_seconds = soonest.breaker.wait_seconds(now_seconds)
        error = BackendFailedError(
            f"the breakers of all backends are open, for {wait_seconds:.3f} s at least",
            client_error=soonest.client_error.retry_after(wait_seconds),
            attempts=soonest.attempts,
        )
        error.backends = frozenset(one[0].id for one in found)
        return error
