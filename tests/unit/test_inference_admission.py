"""The queue in front of the backends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget
from prometheus_client import REGISTRY

from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from libs.routes import EMPTY, RouteTable
from libs.shared_limit import SharedLimit
from services.inference.admission import Admission
from services.inference.slots import (
    MAX_WAITING,
    MAX_WAITING_PER_SLOT,
    MEMORY_ALPHA,
    REQUEST_OVERHEAD_BYTES,
    Demand,
    SlotQueue,
)
from services.inference.work_window import MIN_WORK, WorkWindow
from tests.support.backends import triton_backend

DEPLOYMENT = "deployments/d"


class Clock(SystemClock):
    """Stands still until a test advances it."""

    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    return SlotQueue(DEPLOYMENT, clock)


def demand(tenant="acme", *, deadline=None, priority=0, **fields):
    return Demand(tenant, deadline_seconds=deadline, priority=priority, **fields)


async def hold(queue, tenant="acme", *, slots=1, log=None, name="", release=None, **fields):
    queue.resize(slots)
    async with queue.slot(demand(tenant, **fields)):
        if log is not None:
            log.append(name)
        if release is not None:
            await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_free_slots_are_acquired_at_once(queue):
    """Two slots, two requests, no wait."""
    async with AsyncExitStack() as stack:
        queue.resize(2)
        for _ in range(2):
            await stack.enter_async_context(queue.slot(demand()))


async def test_requests_are_ordered_by_deadline_then_by_priority(queue):
    """Deadline, then priority, then arrival."""
    log: list[str] = []
    first = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, release=first))]
    await settle()
    for name, deadline, priority in [
        ("late", 100, 9), ("low", 50, 0), ("high", 50, 5), ("none", None, 9),
    ]:  # fmt: skip
        tasks.append(
            asyncio.create_task(
                hold(queue, deadline=deadline, priority=priority, log=log, name=name)
            )
        )
    await settle()
    first.set()
    await asyncio.gather(*tasks)
    assert log == ["high", "low", "late", "none"]


async def test_a_wait_that_exceeds_the_deadline_is_refused_at_once(queue, clock):
    """The estimate comes from how long slots were held; the refusal says when to retry."""
    async with queue.slot(demand()):
        clock.seconds += 10
    release = asyncio.Event()
    running = asyncio.create_task(hold(queue, release=release))
    await settle()
    with pytest.raises(ResourceExhausted) as caught:
        await hold(queue, deadline=clock.seconds + 5)
    assert caught.value.retry_after_seconds == pytest.approx(10)
    patient = asyncio.create_task(hold(queue, deadline=clock.seconds + 20))
    await settle()
    release.set()
    await asyncio.gather(running, patient)


async def test_a_full_queue_refuses(queue):
    """A tenant alone may have two thirds of the places; the refusal names its limit."""
    release = asyncio.Event()
    places = 2 * MAX_WAITING_PER_SLOT // 3
    tasks = [asyncio.create_task(hold(queue, release=release)) for _ in range(places + 1)]
    await settle()
    with pytest.raises(ResourceExhausted) as caught:
        await hold(queue)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata == {"queue": DEPLOYMENT, "limit": str(places)}
    other = asyncio.create_task(hold(queue, "other"))
    await settle()
    assert not other.done()
    release.set()
    await asyncio.gather(*tasks, other)


async def test_a_tenant_that_floods_is_overtaken(queue):
    """Who sends one request at a time waits for one of the flood, whatever its priority."""
    log: list[str] = []
    release = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, "flood", release=release))]
    await settle()
    for number in range(15):
        request = hold(queue, "flood", log=log, name=f"flood {number}", priority=9)
        tasks.append(asyncio.create_task(request))
    await settle()
    tasks.append(asyncio.create_task(hold(queue, "victim", log=log, name="victim")))
    await settle()
    release.set()
    await asyncio.gather(*tasks)
    assert log.index("victim") <= 1


async def test_a_tenant_alone_leaves_slots_for_the_next(queue):
    """So the next tenant does not wait until long answers end."""
    release = asyncio.Event()
    flood = [asyncio.create_task(hold(queue, "flood", slots=16, release=release)) for _ in "x" * 40]
    await settle()
    assert queue._slots.held_by("flood") == 13
    await asyncio.wait_for(hold(queue, "victim", slots=16), 1)
    release.set()
    await asyncio.gather(*flood)
    assert (queue._slots.used, queue._places.used, queue._memory.used) == (0, 0, 0)


async def test_the_wait_of_a_tenant_is_that_of_its_own_place(queue, clock):
    """A deadline that is long enough for its own requests is accepted, whoever floods."""
    async with queue.slot(demand()):
        clock.seconds += 10
    release = asyncio.Event()
    tasks = [
        asyncio.create_task(hold(queue, "flood", deadline=clock.seconds + 140, release=release))
        for _ in range(15)
    ]
    await settle()
    with pytest.raises(ResourceExhausted):
        await hold(queue, "flood", deadline=clock.seconds + 141)
    tasks.append(asyncio.create_task(hold(queue, "victim", deadline=clock.seconds + 25)))
    await settle()
    assert not tasks[-1].done()
    release.set()
    await asyncio.gather(*tasks)


async def test_the_memory_of_waiting_and_running_requests_is_limited(clock):
    """A tenant alone gets half of it; what ended or was refused holds nothing."""
    memory = SharedLimit(100 * REQUEST_OVERHEAD_BYTES, alpha=MEMORY_ALPHA)
    queue = SlotQueue(DEPLOYMENT, clock, memory=memory)
    large = 19 * REQUEST_OVERHEAD_BYTES
    release = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, size_bytes=large, release=release)) for _ in range(5)]
    await settle()
    refused = [task for task in tasks if task.done()]
    assert len(refused) == 3
    error = refused[0].exception()
    assert isinstance(error, ResourceExhausted)
    assert error.metadata == {
        "queue": "inference.memory",
        "limit": str(50 * REQUEST_OVERHEAD_BYTES),
    }
    other = asyncio.create_task(hold(queue, "other", size_bytes=large, release=release))
    await settle()
    assert not other.done()
    tasks[1].cancel()
    release.set()
    await asyncio.gather(*tasks, other, return_exceptions=True)
    assert memory.used == 0


async def test_large_work_before_a_pause_does_not_count_after_it(queue):
    """The pause is when nothing runs or waits."""
    log: list[str] = []

    async def wave(*requests: tuple[str, int]) -> None:
        first = asyncio.Event()
        tasks = [asyncio.create_task(hold(queue, "first", release=first))]
        await settle()
        for tenant, work in requests:
            tasks.append(asyncio.create_task(hold(queue, tenant, log=log, name=tenant, work=work)))
        await settle()
        first.set()
        await asyncio.gather(*tasks)

    await wave(("a", 10_000))
    log.clear()
    await wave(*[("b", 1)] * 10, ("a", 1))
    assert log.index("a") <= 1


async def test_parts_of_an_admitted_request_are_not_refused(queue):
    """A large request is refused as a whole or not at all."""
    release = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, release=release)) for _ in range(17)]
    await settle()
    part = asyncio.create_task(hold(queue, is_part=True))
    await settle()
    assert not part.done()
    release.set()
    await asyncio.gather(*tasks, part)


async def test_work_in_flight_is_limited_where_there_is_a_window(clock):
    """Few large requests or many small ones run at once, and at least one always does."""
    window = WorkWindow()
    queue = SlotQueue(DEPLOYMENT, clock, window=window)
    release, log = asyncio.Event(), list[str]()
    tasks = [
        asyncio.create_task(
            hold(queue, slots=9, work=work, log=log, name=str(work), release=release)
        )
        for work in (5000, 100, 200)
    ]
    await settle()
    assert log == ["5000"]
    release.set()
    await asyncio.gather(*tasks)
    assert log == ["5000", "100", "200"]
    window = WorkWindow()
    for _ in range(8):
        assert window.fits(MIN_WORK // 8)
        window.started(MIN_WORK // 8)
    assert not window.fits(1)


async def test_a_cancelled_request_holds_no_slot(queue):
    """Neither one that waits nor one that was just admitted."""
    release = asyncio.Event()
    running = asyncio.create_task(hold(queue, release=release))
    await settle()
    waits, next_one = (asyncio.create_task(hold(queue)) for _ in range(2))
    await settle()
    waits.cancel()
    await settle()
    release.set()
    await running
    await asyncio.wait_for(next_one, 1)
    admitted = asyncio.Event()
    blocker = asyncio.create_task(hold(queue, release=admitted))
    await settle()
    lucky = asyncio.create_task(hold(queue))
    await settle()
    admitted.set()
    await asyncio.sleep(0)
    lucky.cancel()
    await asyncio.gather(blocker, lucky, return_exceptions=True)
    await asyncio.wait_for(hold(queue), 1)


@pytest.mark.parametrize("cancel_first", [False, True])
async def test_a_cancellation_in_the_turn_in_which_a_slot_becomes_free(queue, cancel_first):
    """In either order the request ends as cancelled, and the slot is free for the next one."""
    running = queue.slot(demand())
    await running.__aenter__()
    waits, next_one = (asyncio.create_task(hold(queue)) for _ in range(2))
    await settle()
    if cancel_first:
        waits.cancel()
    await running.__aexit__(None, None, None)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    await asyncio.wait_for(next_one, 1)
    await asyncio.wait_for(hold(queue), 1)


async def test_more_slots_admit_who_waits(queue):
    """A backend that becomes ready is used at once, not when a request ends."""
    release = asyncio.Event()
    log: list[str] = []
    tasks = [
        asyncio.create_task(hold(queue, log=log, name=name, release=release)) for name in "abc"
    ]
    await settle()
    assert log == ["a"]
    queue.resize(3)
    await settle()
    assert log == ["a", "b", "c"]
    release.set()
    await asyncio.gather(*tasks)


def routes_to(*deployments: str, backends: int = 1) -> RouteTable:
    targets = [
        RouteTarget(
            deployment=deployment,
            model_version=f"models/m/versions/{index}.0.0",
            schema=ModelSchema(max_concurrent_requests=1),
            backends=[triton_backend(f"b{number}", "127.0.0.1:1") for number in range(backends)],
        )
        for index, deployment in enumerate(deployments)
    ]
    return RouteTable(epoch="e", revision=1, routes=[ModelRoute(model="m", targets=targets)])


def target(deployment: str) -> RouteTarget:
    return RouteTarget(deployment=deployment, schema=ModelSchema(kind=MODEL_KIND_CHAT))


def gauge(deployment: str) -> float | None:
    return REGISTRY.get_sample_value(
        "headrace_inference_waiting_requests", {"deployment": deployment}
    )


async def test_queues_of_deployments_without_a_route_are_dropped(clock):
    """With their gauges; one that still has requests is dropped after the last of them."""
    admission = Admission(clock)
    admission.update(routes_to("deployments/a", "deployments/b"))
    release = asyncio.Event()
    await hold(admission.queue(target("deployments/a")))
    busy = admission.queue(target("deployments/b"))
    tasks = [asyncio.create_task(hold(busy, release=release)) for _ in range(2)]
    await settle()
    assert gauge("deployments/b") == 1
    admission.update(EMPTY)
    assert gauge("deployments/a") is None
    assert admission.queue(target("deployments/b")) is busy
    release.set()
    await asyncio.gather(*tasks)
    assert gauge("deployments/b") is None
    assert not admission._queues


async def test_a_queue_stays_while_its_deployment_has_a_route(clock):
    """Also where the route was missing for a moment, or no backend is ready."""
    admission = Admission(clock)
    queue = admission.queue(target(DEPLOYMENT))
    release = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, release=release)) for _ in range(2)]
    await settle()
    admission.update(EMPTY)
    admission.update(routes_to(DEPLOYMENT, backends=0))
    admission.update(routes_to(DEPLOYMENT, backends=2))
    await settle()
    assert gauge(DEPLOYMENT) == 0  # two backends have two slots
    release.set()
    await asyncio.gather(*tasks)
    assert admission.queue(target(DEPLOYMENT)) is queue


def test_few_enough_requests_wait_for_a_deployment_of_many_slots():
    """All requests that wait or run are in the edge's number of requests, which others need."""
    queue = SlotQueue("deployments/d", SystemClock())
    queue.resize(10)
    assert queue._places.limit == 10 * MAX_WAITING_PER_SLOT
    queue.resize(1000)
    assert queue._places.limit == MAX_WAITING


async def test_an_older_route_of_a_caller_does_not_change_the_slots(clock):
    """A caller that fell back to it may have waited for long; only new routes do."""
    admission = Admission(clock)
    admission.update(routes_to(DEPLOYMENT, backends=2))
    older, newer = (next(iter(routes_to(DEPLOYMENT, backends=count).targets())) for count in (1, 2))
    async with admission.slot(newer, demand()):
        before = admission.queue(newer)._slots.limit
        async with admission.slot(older, demand()):
            assert admission.queue(newer)._slots.limit == before
    admission.update(routes_to(DEPLOYMENT, backends=1))
    assert admission.queue(newer)._slots.limit == before // 2
