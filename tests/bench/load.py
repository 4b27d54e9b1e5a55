"""A load generator for HTTP/1.1 that sends raw bytes, so that its own cost is small."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Result:
    """What a run measured.

    Attributes:
        latencies_seconds: of each request, from the first byte sent to the last byte received.
        first_seconds: of each request, to the first part of the body with a unit.
        units: sum of `count` over all bodies: chunks or tokens.
        errors: requests without status 200 or with an incomplete response.
    """

    seconds: float = 0.0
    latencies_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    units: int = 0
    errors: int = 0

    @property
    def requests(self) -> int:
        """Number of answered requests."""
        return len(self.latencies_seconds)

    def percentile_ms(self, share: float, *, first: bool = False) -> float:
        """Returns a percentile of the latencies, or of the times to the first unit."""
        values = sorted(self.first_seconds if first else self.latencies_seconds)
        return 1000 * values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def http_request(*, path: str, body: bytes, port: int, token: str = "") -> bytes:
    """Returns a POST request as bytes."""
    authorization = f"authorization: Bearer {token}\r\n" if token else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"{authorization}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def closed_loop(
    *,
    port: int,
    request: bytes,
    connections: int,
    requests: int,
    count: Callable[[bytes], int] = lambda _body: 0,
    interval_seconds: float = 0.0,
) -> Result:
    """Sends requests; each connection sends the next one when the last one is answered.

    Args:
        port: port on the loopback interface.
        request: the bytes of each request.
        connections: number of concurrent connections, kept alive.
        requests: total number of requests.
        count: counts the units in a part of a body; parts may end anywhere.
        interval_seconds: makes it an open loop: one request is due each interval, a free connection
            sends it, and its latency is measured from the due time.
    """
    result = Result()
    started = time.perf_counter()
    due = iter(started + index * interval_seconds for index in range(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            for due_at in due:
                if interval_seconds:
                    await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
                start = due_at if interval_seconds else time.perf_counter()
                writer.write(request)
                await _answer(reader, result, start, count)
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    result.seconds = time.perf_counter() - started
    return result


async def _answer(
    reader: asyncio.StreamReader, result: Result, start: float, count: Callable[[bytes], int]
) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    first = 0.0
    if b"content-length:" in lower:
        size = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(size)
        first = time.perf_counter()
        result.units += count(body)
    else:  # chunked: read without parsing chunks, which costs the client least
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            if not data:
                result.errors += 1
                return
            tail = (tail + data)[-5:] if len(data) < 5 else data  # the size of the last chunk
            units = count(data)
            if units and not first:
                first = time.perf_counter()
            result.units += units
    if not head.startswith(b"HTTP/1.1 200"):
        result.errors += 1
        return
    end = time.perf_counter()
    result.first_seconds.append((first or end) - start)
    result.latencies_seconds.append(end - start)
