"""What tests that send thousands of malformed requests to a running mesh share."""

from __future__ import annotations

import asyncio
import heapq
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar

from deploy.local.supervisor import process_states
from libs.rpc import access
from tests.support.mesh import RunningMesh

T = TypeVar("T")

# Of one request, on a quiet machine, for those that took the longest among the others.
LONGEST_SECONDS = 0.1
# While the machine is busy with them: the mesh, the edge and the test share two cores.
LONGEST_HEARTBEAT_SECONDS = 1.0
_BEAT_SECONDS = 0.02
_TRIES = 5
_REPLAYED = 10
_FAULTS = frozenset({"Unknown", "Internal", "DataLoss", "UNKNOWN", "INTERNAL", "DATA_LOSS"})
ALL_SCOPES = " ".join(
    scope for scope in access._SCOPE_OF_VALUE.values() if scope != access.INTERNAL
)


class Slowest(Generic[T]):
    """Keeps the requests that took the longest."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, T]] = []
        self._count = 0

    def add(self, seconds: float, request: T) -> None:
        self._count += 1
        heapq.heappush(self._kept, (seconds, self._count, request))
        if len(self._kept) > _REPLAYED:
            heapq.heappop(self._kept)

    async def check(self, send: Callable[[T], Awaitable[object]]) -> None:
        """Sends each alone, a few times: the fastest run is its real duration."""
        for seconds, _, request in self._kept:
            alone = []
            for _ in range(_TRIES):
                began = time.perf_counter()
                await send(request)
                alone.append(time.perf_counter() - began)
            assert min(alone) < LONGEST_SECONDS, f"{seconds:.3f} s, {min(alone):.3f} s: {request!r}"


@asynccontextmanager
async def heartbeat(beat: Callable[[], Awaitable[object]]) -> AsyncIterator[list[float]]:
    """Sends a harmless request again and again; yields how many seconds each took."""
    taken: list[float] = []

    async def beats() -> None:
        while True:
            began = time.perf_counter()
            await beat()
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(_BEAT_SECONDS)

    task = asyncio.create_task(beats())
    try:
        yield taken
        assert not task.done(), task.exception()
        assert len(taken) > 10
        assert max(taken) < LONGEST_HEARTBEAT_SECONDS
    finally:
        task.cancel()
        await asyncio.wait([task])


async def in_parallel(
    requests: Iterator[T], send: Callable[[T], Awaitable[object]], *, width: int
) -> None:
    """Sends requests, so many concurrently; raises the error of the first that failed."""

    async def sending() -> None:
        for request in requests:
            try:
                await send(request)
            except BaseException as error:
                error.add_note(f"the request: {request!r:.2000}")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(sending())


@contextmanager
def unharmed(mesh: RunningMesh) -> Iterator[None]:
    """Checks that a block restarts no process, and that no log has an internal error."""
    before = {name: state.pid for name, state in process_states(mesh.layout).items()}
    sizes = {path: path.stat().st_size for path in mesh.layout.logs.glob("*.log")}
    yield
    time.sleep(0.5)  # the edge writes its log in batches
    after = {name: state.pid for name, state in process_states(mesh.layout).items()}
    assert after == before
    faults = []
    for path in mesh.layout.logs.glob("*.log"):
        with path.open("rb") as log:
            log.seek(sizes.get(path, 0))
            faults += [line for line in map(_parsed, log) if line and _is_fault(line)]
    assert not faults, faults[:5]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_fault(line: dict[str, Any]) -> bool:
    if line.get("event") == "request":  # the edge
        status, flags = line.get("status"), set(str(line.get("flags")).split(","))
        if {"DR", "DC"} & flags:  # the client has gone
            return False
        # Of its own and of transcoded responses the edge derives one from HTTP's status.
        is_answer = (status, line.get("protocol")) == (200, "HTTP/2")  # gRPC-Web has it in the body
        is_answer = is_answer and line.get("details") == "via_upstream"
        return status in (500, 502) or (is_answer and line.get("grpc_status") in _FAULTS)
    return line.get("level") == "error" or line.get("event") == "unexpected error"
