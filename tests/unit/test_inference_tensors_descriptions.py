"""What Triton says about a model is asked for once."""

from __future__ import annotations

import asyncio

import pytest

from libs.clock import SystemClock
from libs.errors import DeadlineExceeded, Unavailable
from services.inference.tensors import descriptions
from services.inference.tensors.descriptions import Descriptions, Key


class Triton:
    """Counts its calls."""

    def __init__(self, *, error: Exception | None = None, size_bytes: int = 3) -> None:
        self.calls = 0
        self.error = error
        self.answers = asyncio.Event()
        self.answers.set()
        self._answer = b"x" * size_bytes

    async def describe(self) -> bytes:
        self.calls += 1
        await self.answers.wait()
        if self.error:
            raise self.error
        return self._answer


def key(name: str = "m", *, digest: str = "sha256:0", method: str = "ModelConfig") -> Key:
    return Key(f"deployments/{name}", f"models/{name}/versions/1.0.0", digest, method)


@pytest.fixture
def known() -> Descriptions:
    return Descriptions(SystemClock())


async def test_a_description_is_asked_for_once(known):
    """A hundred callers at once or one after the other; other versions and methods are others."""
    triton = Triton()
    for _ in range(2):
        calls = [known.get(key(), triton.describe, deadline_seconds=None) for _ in range(100)]
        assert set(await asyncio.gather(*calls)) == {b"xxx"}
    assert triton.calls == 1
    for other in (key("n"), key(digest="sha256:1"), key(method="ModelMetadata")):
        await known.get(other, triton.describe, deadline_seconds=None)
    assert triton.calls == 4


async def test_an_error_is_not_kept(known):
    """The next caller asks again."""
    broken, good = Triton(error=Unavailable("no", reason="BACKEND_FAILED")), Triton()
    with pytest.raises(Unavailable):
        await known.get(key(), broken.describe, deadline_seconds=None)
    assert await known.get(key(), good.describe, deadline_seconds=None) == b"xxx"


async def test_whoever_waits_for_another_caller_has_a_deadline(known):
    """It need not be that caller's, whose end stops nobody else."""
    triton = Triton()
    triton.answers.clear()
    first = asyncio.create_task(known.get(key(), triton.describe, deadline_seconds=None))
    await asyncio.sleep(0)
    soon = SystemClock().monotonic_seconds() + 0.05
    with pytest.raises(DeadlineExceeded):
        await known.get(key(), triton.describe, deadline_seconds=soon)
    waiting = asyncio.create_task(known.get(key(), triton.describe, deadline_seconds=None))
    await asyncio.sleep(0)
    first.cancel()
    triton.answers.set()
    assert await waiting == b"xxx"
    assert triton.calls == 2


async def test_only_so_many_are_kept(known, monkeypatch):
    """The ones that were asked for last, by number and by size."""
    monkeypatch.setattr(descriptions, "MAX_DESCRIPTIONS", 2)
    monkeypatch.setattr(descriptions, "MAX_BYTES", 10)
    triton = Triton()
    for name in ("a", "b", "a", "c", "a"):
        await known.get(key(name), triton.describe, deadline_seconds=None)
    assert triton.calls == 3
    await known.get(key("b"), triton.describe, deadline_seconds=None)
    assert triton.calls == 4
    large = Triton(size_bytes=11)
    for _ in range(2):
        assert len(await known.get(key("d"), large.describe, deadline_seconds=None)) == 11
    assert large.calls == 2
    await known.get(key("b"), triton.describe, deadline_seconds=None)
    assert triton.calls == 5
