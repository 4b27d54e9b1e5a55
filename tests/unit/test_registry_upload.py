"""How many uploads run, and how slow they may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
from headrace.registry.v1 import registry_pb2 as pb

from libs.errors import DeadlineExceeded, ResourceExhausted
from services.registry.upload import Upload, UploadLimits, UploadSlots


def refused(slots: UploadSlots, tenant: str) -> str:
    """Returns the limit that the error names."""
    with pytest.raises(ResourceExhausted) as caught, slots.slot(tenant):
        pass
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata["queue"] == "uploads"
    return caught.value.metadata["limit"]


def test_one_tenant_has_half_of_the_uploads_at_most():
    """The others stay for the others, until all are in use."""
    slots = UploadSlots(4)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(slots.slot("one"))
        assert refused(slots, "one") == "2"
        held.enter_context(slots.slot("another"))
        assert refused(slots, "another") == "1"
        held.enter_context(slots.slot("third"))
        assert refused(slots, "fourth") == "4"
    with slots.slot("one"):
        pass


async def chunks(
    count: int, *, size_bytes: int, pause_seconds: float
) -> AsyncIterator[pb.UploadArtifactRequest]:
    for _ in range(count):
        await asyncio.sleep(pause_seconds)
        yield pb.UploadArtifactRequest(chunk=bytes(size_bytes))


async def received(messages: AsyncIterator[pb.UploadArtifactRequest]) -> int:
    limits = UploadLimits(idle_seconds=0.5, bytes_per_second=1000)
    size_bytes = 0
    async for chunk in Upload(messages, limits=limits).chunks():
        size_bytes += len(chunk)
    return size_bytes


async def test_an_upload_may_pause():
    """For as long as before, if it makes up for it."""
    assert await received(chunks(8, size_bytes=200, pause_seconds=0.1)) == 1600


async def test_small_chunks_in_the_last_moment_do_not_keep_an_upload_open():
    """All pauses together are no longer than one, where nearly nothing comes between them."""
    start = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded) as caught:
        await received(chunks(100, size_bytes=1, pause_seconds=0.1))
    assert caught.value.metadata == {"waiting_for": "chunk"}
    assert asyncio.get_running_loop().time() - start < 3


async def test_a_fast_start_does_not_pay_for_a_slow_rest():
    """Else a few megabytes would hold a place for an hour."""

    async def fast_then_slow() -> AsyncIterator[pb.UploadArtifactRequest]:
        yield pb.UploadArtifactRequest(chunk=bytes(100_000))
        async for message in chunks(100, size_bytes=1, pause_seconds=0.1):
            yield message

    with pytest.raises(DeadlineExceeded):
        await received(fast_then_slow())
