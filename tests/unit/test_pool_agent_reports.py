"""What the agent reads from the registry and reports to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1.registry_internal_pb2 import (
    DeploymentEntry,
    DownloadArtifactResponse,
)

from libs.clock import SystemClock
from services.pool_agent.archive import ArtifactRefused
from services.pool_agent.domain import Backoff, Kind, Report, State, Wanted
from services.pool_agent.download import Downloads
from services.pool_agent.reporter import Reporter
from services.pool_agent.wire import report_to_proto, reports_from_proto, wanted_from_proto

DIGEST = "sha256:" + "0123456789abcdef" * 4
READY = Report("alpha-1.0.0-0123456789ab", State.READY, DIGEST, "")
LOADING = Report("alpha-1.0.0-0123456789ab", State.LOADING, "", "fetching the artifact")


def deployment(name: str = "alpha", **fields: Any) -> DeploymentEntry:
    defaults: dict[str, Any] = {
        "model_version": "models/alpha/versions/1.0.0+cpu",
        "artifact_digest": DIGEST,
        "schema": model_pb2.ModelSchema(kind=model_pb2.MODEL_KIND_CHAT),
    }
    return DeploymentEntry(name=f"deployments/{name}", **{**defaults, **fields})


def test_the_name_of_a_version_on_triton_contains_its_digest():
    """Two artifacts never share a name; a `+` never comes into URLs and folders."""
    wanted = wanted_from_proto([deployment()])["deployments/alpha"]
    assert wanted == Wanted("alpha", "1.0.0+cpu", DIGEST, Kind.CHAT)
    assert wanted.backend_model == "alpha-1.0.0_cpu-0123456789ab"


def test_what_others_run_and_what_cannot_be_read_is_not_wanted_here():
    """Models of providers, kinds that are newer than this agent, and a malformed version."""
    provided = deployment(
        "provided", provider=backend_pb2.ProviderTarget(base_url="https://example.com")
    )
    unknown = deployment("unknown", schema=model_pb2.ModelSchema())
    malformed = deployment("malformed", model_version="alpha@1.0.0")
    found = wanted_from_proto([provided, unknown, malformed, deployment()])
    assert set(found) == {"deployments/alpha"}


@pytest.mark.parametrize("report", [READY, LOADING, Report("a", State.FAILED, "", "why")])
def test_a_report_comes_back_from_the_registry_as_it_was_sent(report):
    """Otherwise the reporter would send it again and again."""
    backend = report_to_proto(report, backend_id="triton-0", address="127.0.0.1:1")
    assert backend.triton.address == "127.0.0.1:1"
    other = report_to_proto(report, backend_id="triton-1", address="127.0.0.1:2")
    entry = deployment(backends=[other, backend])
    assert reports_from_proto([entry], "triton-0") == {"deployments/alpha": report}


def test_pauses_grow_up_to_a_limit():
    """However many failures there are."""
    backoff = Backoff(first_seconds=1, max_seconds=15)
    assert [backoff.seconds(failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [
        1, 2, 4, 8, 15, 15,
    ]  # fmt: skip


class Registry:
    """Accepts reports; refuses them while `error` is set."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Report]] = []
        self.error: grpc.StatusCode | None = None

    async def send(self, name: str, report: Report) -> None:
        self.sent.append((name, report))
        if self.error is not None:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(self.error, nothing, nothing, "", "")


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
async def reporter(registry: Registry) -> AsyncIterator[Reporter]:
    made = Reporter(registry.send, SystemClock())
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110  # a list has no event
            await asyncio.sleep(0.01)


async def test_only_what_the_registry_does_not_have_is_sent(registry, reporter):
    """An agent that restarts beside a loaded model sends nothing."""
    reporter.received({"deployments/a": READY})
    reporter.report("deployments/a", READY)
    reporter.report("deployments/b", READY)
    await until(lambda: bool(registry.sent))
    await asyncio.sleep(0.05)
    assert registry.sent == [("deployments/b", READY)]


async def test_a_report_is_sent_until_the_registry_accepts_it(registry, reporter):
    """And not again afterwards."""
    registry.error = grpc.StatusCode.UNAVAILABLE
    reporter.report("deployments/a", READY)
    await until(lambda: len(registry.sent) >= 2)
    registry.error = None
    accepted = len(registry.sent) + 1
    await until(lambda: len(registry.sent) == accepted)
    await asyncio.sleep(0.3)
    assert len(registry.sent) == accepted


async def test_a_report_that_the_registry_has_lost_is_sent_again(registry, reporter):
    """For example, because it was restored from a backup."""
    reporter.report("deployments/a", READY)
    await until(lambda: len(registry.sent) == 1)
    reporter.received({"deployments/a": LOADING})
    await until(lambda: len(registry.sent) == 2)
    assert registry.sent[-1] == ("deployments/a", READY)


async def test_a_refused_report_does_not_delay_others(registry, reporter):
    """Of a deleted deployment, say; it is not sent for ever."""
    registry.error = grpc.StatusCode.NOT_FOUND
    reporter.report("deployments/deleted", READY)
    reporter.report("deployments/also-deleted", READY)
    await until(lambda: len(registry.sent) == 2)
    await asyncio.sleep(0.3)
    assert len(registry.sent) == 2


def stream_of(
    *chunks: bytes,
) -> Callable[[str], AsyncIterator[DownloadArtifactResponse]]:
    async def stream(_digest: str) -> AsyncIterator[DownloadArtifactResponse]:
        for chunk in chunks:
            yield DownloadArtifactResponse(chunk=chunk)

    return stream


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def test_bytes_with_the_right_digest_are_stored(tmp_path):
    """However they are divided into chunks."""
    downloads = Downloads(stream_of(b"one", b"", b"two"), limit_bytes=100)
    await downloads.fetch(digest_of(b"onetwo"), tmp_path / "artifact")
    assert (tmp_path / "artifact").read_bytes() == b"onetwo"


async def test_bytes_with_another_digest_are_not_stored(tmp_path):
    """The error has both digests."""
    downloads = Downloads(stream_of(b"one"), limit_bytes=100)
    with pytest.raises(ArtifactRefused, match=digest_of(b"one")):
        await downloads.fetch(digest_of(b"two"), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


async def test_more_bytes_than_allowed_are_refused_as_they_arrive(tmp_path):
    """Before they fill the disk."""
    downloads = Downloads(stream_of(b"one", b"two", b"three"), limit_bytes=5)
    with pytest.raises(ArtifactRefused, match="more than 5 bytes"):
        await downloads.fetch(digest_of(b"onetwothree"), tmp_path / "artifact")
    assert (tmp_path / "artifact").stat().st_size <= 5
