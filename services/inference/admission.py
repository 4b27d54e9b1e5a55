"""Admission control: the queues of all deployments, and the memory that their requests share.

No tenant can take everything: a tenant alone gets most of the slots, of the places in the queue and
of the memory for requests, but never all of them (`SharedLimit`), so that the next tenant starts
immediately. Backends other than those of chat models receive only as much work as keeps them busy
(`WorkWindow`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT
from headrace.router.v1.router_internal_pb2 import RouteTarget
from prometheus_client import Gauge

from libs.clock import Clock
from libs.routes import RouteTable
from libs.shared_limit import SharedLimit
from services.inference.slots import (
    DEFAULT_MEMORY_LIMIT_BYTES,
    MEMORY_ALPHA,
    REQUEST_OVERHEAD_BYTES,
    Demand,
    Slot,
    SlotQueue,
    take_memory,
)
from services.inference.work_window import DEFAULT_TARGET_SECONDS, WorkWindow

_WAITING = Gauge(
    "headrace_inference_waiting_requests", "Requests that wait for a slot.", ["deployment"]
)
_HELD_BYTES = Gauge(
    "headrace_inference_held_bytes", "Memory of the requests that wait or run, as it is counted."
)

# Used where the version's schema does not set `max_concurrent_requests`.
DEFAULT_CONCURRENT_REQUESTS = 256
# Counting tokens needs no slot of those that generate, and takes milliseconds.
COUNTING_SLOTS_PER_BACKEND = 4


class HeldMemory:
    """Counts the memory of a request against its tenant's limit while its block runs."""

    def __init__(self, memory: SharedLimit, tenant: str, size_bytes: int) -> None:
        self._memory = memory
        self._tenant = tenant
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        take_memory(self._memory, self._tenant, self._size_bytes)

    def __exit__(self, *_error: object) -> None:
        self._memory.release(self._tenant, self._size_bytes)


class Admission:
    """The queues of all deployments, and what their requests share.

    Attributes:
        memory: of the inputs of all requests, in bytes.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        weights: Mapping[str, float] = {},
        target_seconds: float = DEFAULT_TARGET_SECONDS,
    ) -> None:
        """Makes it without queues.

        Args:
            clock: the time.
            memory_limit_bytes: what all requests hold together.
            weights: of tenants, where they are not 1.
            target_seconds: how long requests may take at backends that are not chat models.
        """
        self._clock = clock
        self.memory = SharedLimit(memory_limit_bytes, alpha=MEMORY_ALPHA)
        self._weights = dict(weights)
        self._target_seconds = target_seconds
        self._queues: dict[str, SlotQueue] = {}
        self._counting: dict[str, SlotQueue] = {}
        _HELD_BYTES.set_function(lambda: self.memory.used)

    def slot(self, target: RouteTarget, demand: Demand, *, counting: bool = False) -> Slot:
        """Returns a context manager that holds a slot of a deployment; see `SlotQueue.slot`.

        Args:
            target: the deployment.
            demand: what the request asks for.
            counting: tokens are counted, and none generated: such requests have their own slots.
        """
        return self._queue(target, self._counting if counting else self._queues).slot(demand)

    def hold(self, tenant: str, size_bytes: int) -> HeldMemory:
        """Returns a context manager that counts the memory of a request.

        Raises:
            ResourceExhausted: on entry: the tenant, or all of them, hold too much (`QUEUE_FULL`).
        """
        return HeldMemory(self.memory, tenant, size_bytes + REQUEST_OVERHEAD_BYTES)

    def queue(self, target: RouteTarget) -> SlotQueue:
        """Returns the queue of a deployment, a new one where there is none."""
        return self._queue(target, self._queues)

    def update(self, routes: RouteTable) -> None:
        """Resizes the queues to these routes and drops those of all other deployments.

        A queue that still has requests is dropped when the last of them ends.
        """
        targets = {target.deployment: target for target in routes.targets()}
        for queues in (self._queues, self._counting):
            for deployment, queue in list(queues.items()):
                if deployment not in targets:
                    queue.retire(partial(self._drop, queues, deployment))
                    continue
                queue.keep()
                # Without a ready backend nothing is admitted anyway.
                if slots := self._slots_in(queues, targets[deployment]):
                    queue.resize(slots)

    def _queue(self, target: RouteTarget, queues: dict[str, SlotQueue]) -> SlotQueue:
        deployment = target.deployment
        found = queues.get(deployment)
        if found is None:
            is_chat = target.schema.kind == MODEL_KIND_CHAT
            found = queues[deployment] = SlotQueue(
                deployment,
                self._clock,
                memory=self.memory,
                window=None if is_chat else WorkWindow(self._target_seconds),
                weight_of=self._weight_of,
                gauge=_WAITING.labels(deployment) if queues is self._queues else None,
            )
            # A caller's route may be older than what `update` knows: it sizes a new queue only.
            found.resize(max(1, self._slots_in(queues, target)))
        return found

    def _slots_in(self, queues: dict[str, SlotQueue], target: RouteTarget) -> int:
        if queues is self._counting:
            return COUNTING_SLOTS_PER_BACKEND * len(target.backends)
        return slots_of(target)

    def _weight_of(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _drop(self, queues: dict[str, SlotQueue], deployment: str) -> None:
        del queues[deployment]
        if queues is self._queues:
            _WAITING.remove(deployment)


def slots_of(target: RouteTarget) -> int:
    """Returns how many requests the backends of a deployment process concurrently."""
    per_backend = target.schema.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
    return per_backend * len(target.backends)
