"""Artifacts are stored completely or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from headrace.registry.v1 import registry_pb2 as pb

from libs.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from libs.rpc.status import headrace_errors
from services.registry.upload import UploadLimits
from tests.support.registry import (
    REGISTRAR,
    USER,
    RegistryClient,
    digest_of,
    parts,
    serving_registry,
)

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
CONTENT = bytes(range(256)) * 12_000  # 2.9 MiB: three chunks
LIMITS = UploadLimits(size_bytes=4 * MIB, idle_seconds=0.5, concurrent=4)


@pytest.fixture
async def registry(tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    async with serving_registry(url, tmp_path, limits=LIMITS) as client:
        yield client


@pytest.fixture
def stored(tmp_path):
    """Returns the names of all files of the store, those of running uploads included."""

    def files():
        found = (tmp_path / "artifacts").rglob("*")
        return sorted(path.name for path in found if path.is_file())

    return files


async def announce_and_stall(size_bytes: int = 10) -> AsyncIterator[pb.UploadArtifactRequest]:
    yield pb.UploadArtifactRequest(
        metadata=pb.ArtifactMetadata(digest="sha256:" + "0" * 64, size_bytes=size_bytes)
    )
    yield pb.UploadArtifactRequest(chunk=b"12345")
    await asyncio.Event().wait()


async def eventually(holds: Callable[[], bool]) -> None:
    """Waits for a condition that has no event."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # a file system has no event to wait for
            await asyncio.sleep(0.01)


async def refused(
    registry: RegistryClient, requests: AsyncIterator[pb.UploadArtifactRequest]
) -> InvalidArgument:
    """Returns the error of an upload that must fail."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await registry.stub.UploadArtifact(requests, metadata=REGISTRAR)
    return raised.value


async def test_what_was_uploaded_is_downloaded(registry, stored):
    """Byte for byte, by the digest of its bytes."""
    digest = digest_of(CONTENT)
    assert await registry.upload(CONTENT) == digest
    assert await registry.download(digest) == CONTENT
    assert stored() == [digest.removeprefix("sha256:")]


async def test_an_artifact_may_be_uploaded_again_and_replaces_a_damaged_one(registry, tmp_path):
    """Uploading it twice is not an error; what is stored afterwards has the digest."""
    digest = await registry.upload(CONTENT)
    path = tmp_path / "artifacts" / "sha256" / digest.removeprefix("sha256:")
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert await registry.upload(CONTENT) == digest
    assert await registry.download(digest) == CONTENT


async def test_bytes_of_another_digest_are_refused(registry, stored):
    """The error has both digests, and nothing is stored."""
    wrong = "sha256:" + "0" * 64
    error = await refused(registry, parts(CONTENT, digest=wrong))
    assert error.reason == "DIGEST_MISMATCH"
    assert error.metadata == {"expected_digest": wrong, "actual_digest": digest_of(CONTENT)}
    assert stored() == []


@pytest.mark.parametrize("size_bytes", [len(CONTENT) - 1, len(CONTENT) + 1, 0, -1])
async def test_another_size_than_announced_is_refused(registry, stored, size_bytes):
    """Bytes beyond the announced size are not read to their end."""
    error = await refused(registry, parts(CONTENT, size_bytes=size_bytes))
    assert error.reason == "INVALID_FIELD"
    assert error.field_violations[0][0] == "metadata.size_bytes"
    assert stored() == []


async def test_a_chunk_has_a_limit(registry, stored):
    """One MiB, and the error says so."""
    error = await refused(registry, parts(CONTENT, chunk_bytes=MIB + 1))
    assert error.reason == "MESSAGE_TOO_LARGE"
    assert error.metadata == {"limit_bytes": str(MIB)}
    assert stored() == []


async def test_an_artifact_has_a_limit_that_is_checked_before_its_bytes_are_sent(registry):
    """The caller need not send gigabytes to learn that they are too many."""
    error = await refused(registry, announce_and_stall(4 * MIB + 1))
    assert error.reason == "MESSAGE_TOO_LARGE"
    assert error.metadata == {"limit_bytes": str(4 * MIB)}


async def test_an_upload_starts_with_its_metadata_and_has_it_once(registry, stored):
    """The error of anything else names the field."""

    async def without() -> AsyncIterator[pb.UploadArtifactRequest]:
        yield pb.UploadArtifactRequest(chunk=b"x")

    async def nothing() -> AsyncIterator[pb.UploadArtifactRequest]:
        return
        yield

    async def twice() -> AsyncIterator[pb.UploadArtifactRequest]:
        async for part in parts(CONTENT):
            yield part
        async for part in parts(CONTENT):
            yield part

    for requests, field in [(without(), "metadata"), (nothing(), "metadata"), (twice(), "chunk")]:
        error = await refused(registry, requests)
        assert error.field_violations[0][0] == field
    error = await refused(registry, parts(CONTENT, digest="1234"))
    assert error.field_violations[0][0] == "metadata.digest"
    assert stored() == []


async def test_nothing_is_stored_of_an_upload_that_is_cancelled(registry, stored):
    """The slot and the bytes are free again."""
    call = registry.stub.UploadArtifact(announce_and_stall(), metadata=REGISTRAR)
    await eventually(lambda: len(stored()) == 1)
    call.cancel()
    await eventually(lambda: stored() == [])


async def test_an_upload_that_stalls_is_ended(registry, stored):
    """A caller that sends nothing does not occupy a slot for ever, and is sent the reason."""
    with pytest.raises(DeadlineExceeded) as raised, headrace_errors():
        await registry.stub.UploadArtifact(announce_and_stall(), metadata=REGISTRAR)
    assert raised.value.metadata == {"waiting_for": "chunk"}
    assert stored() == []


async def test_only_so_many_uploads_run_at_once(registry, stored):
    """One more than a tenant may have is refused with a delay for its retry, then accepted."""
    stalled = [
        asyncio.ensure_future(
            registry.stub.UploadArtifact(announce_and_stall(), metadata=REGISTRAR).code()
        )
        for _ in range(2)
    ]
    await eventually(lambda: len(stored()) == 2)
    with pytest.raises(ResourceExhausted) as raised, headrace_errors():
        await registry.upload(b"small")
    assert raised.value.reason == "QUEUE_FULL"
    assert raised.value.metadata == {"queue": "uploads", "limit": "2"}
    assert raised.value.retry_after_seconds == 1.0
    await asyncio.gather(*stalled)
    assert await registry.upload(b"small")


async def test_an_artifact_that_does_not_exist_is_not_found(registry):
    """An invalid digest is refused."""
    with pytest.raises(NotFound) as raised, headrace_errors():
        await registry.download("sha256:" + "0" * 64)
    assert raised.value.reason == "RESOURCE_NOT_FOUND"
    with pytest.raises(InvalidArgument), headrace_errors():
        await registry.download("sha256:../../registry.db")


async def test_uploads_need_the_scope_registry(registry):
    """Users of models may not add any, and get the error even while they are still sending."""
    for _ in range(25):
        with pytest.raises(PermissionDenied), headrace_errors():
            await registry.stub.UploadArtifact(parts(CONTENT), metadata=USER)
