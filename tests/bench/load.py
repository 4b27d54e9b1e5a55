"""Load on HTTP/1.1 from one small client: raw bytes, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Result:
    """What a run saw.

    Attributes:
        latencies_seconds: of each request, from its first byte sent to its last byte received.
        first_seconds: of each request, to the first byte of its body that counts.
        units: what `count` found in all bodies: chunks, tokens.
        errors: requests that were not answered with 200, or broke off.
    """

    seconds: float = 0.0
    latencies_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    units: int = 0
    errors: int = 0

    @property
    def requests(self) -> int:
        """How many requests were answered."""
        return len(self.latencies_seconds)

    def percentile_ms(self, share: float, *, first: bool = False) -> float:
        """Returns a percentile of the latencies, or of the times to the first byte."""
        values = sorted(self.first_seconds if first else self.latencies_seconds)
        return 1000 * values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def http_request(*, path: str, body: bytes, port: int, token: str = "") -> bytes:
    """Returns the bytes of one POST."""
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
    """Sends so many requests in all, each connection its next one when the one before is answered.

    Args:
        port: on the loopback.
        request: its bytes; the same for all.
        connections: how many at once, each kept alive.
        requests: how many in all.
        count: counts the units of a piece of a body; pieces may be cut anywhere.
        interval_seconds: an open loop instead: one request is due each interval, a connection that
            is free sends it, and its latency counts from when it was due.
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
                begin = due_at if interval_seconds else time.perf_counter()
                writer.write(request)
                await _answer(reader, result, begin, count)
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    result.seconds = time.perf_counter() - started
    return result


async def _answer(
    reader: asyncio.StreamReader, result: Result, begin: float, count: Callable[[bytes], int]
) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    first = 0.0
    if b"content-length:" in lower:
        size = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(size)
        first = time.perf_counter()
        result.units += count(body)
    else:  # chunked: read as it comes, which costs the client least
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            if not data:
                result.errors += 1
                return
            tail = (tail + data)[-5:] if len(data) < 5 else data  # the end's size
            units = count(data)
            if units and not first:
                first = time.perf_counter()
            result.units += units
    if not head.startswith(b"HTTP/1.1 200"):
        result.errors += 1
        return
    end = time.perf_counter()
    result.first_seconds.append((first or end) - begin)
    result.latencies_seconds.append(end - begin)
