"""What the agent asks of the registry and tells it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2

from libs.clock import SystemClock
from services.pool_agent.archive import ArtifactRefused
from services.pool_agent.domain import Backoff, Kind, Report, State, Wanted
from services.pool_agent.download import Downloads
from services.pool_agent.reporter import Reporter
from services.pool_agent.wire import report_to_proto, reports_from_proto, wanted_from_proto

DIGEST = "sha256:" + "0123456789abcdef" * 4
READY = Report("alpha-1.0.0-0123456789ab", State.READY, DIGEST, "")
LOADING = Report("alpha-1.0.0-0123456789ab", State.LOADING, "", "fetching the artifact")


def deployment(name: str = "alpha", **fields: Any) -> registry_pb2.Deployment:
    defaults: dict[str, Any] = {
        "model_version": "models/alpha/versions/1.0.0+cpu",
        "artifact_digest": DIGEST,
        "schema": model_pb2.ModelSchema(kind=model_pb2.MODEL_KIND_CHAT),
    }
    return registry_pb2.Deployment(name=f"deployments/{name}", **{**defaults, **fields})


def test_a_version_has_the_name_that_its_artifact_gives_it():
    """Two artifacts never share a name on Triton; `+` is not let into URLs and folders."""
    wanted = wanted_from_proto([deployment()])["deployments/alpha"]
    assert wanted == Wanted("alpha", "1.0.0+cpu", DIGEST, Kind.CHAT)
    assert wanted.backend_model == "alpha-1.0.0_cpu-0123456789ab"


def test_what_others_run_is_not_wanted_here():
    """Models of providers, and kinds that are newer than this agent."""
    provided = deployment("provided", provider=model_pb2.Provider(base_url="https://example.com"))
    unknown = deployment("unknown", schema=model_pb2.ModelSchema())
    assert set(wanted_from_proto([provided, unknown, deployment()])) == {"deployments/alpha"}


@pytest.mark.parametrize("report", [READY, LOADING, Report("a", State.FAILED, "", "why")])
def test_a_report_comes_back_from_the_registry_as_it_was_told(report):
    """Else the reporter would tell it again and again."""
    backend = report_to_proto(report, backend_id="triton-0", address="127.0.0.1:1")
    stranger = report_to_proto(report, backend_id="triton-1", address="127.0.0.1:2")
    held = deployment(backends=[stranger, backend])
    assert reports_from_proto([held], "triton-0") == {"deployments/alpha": report}


def test_pauses_grow_up_to_a_limit():
    """However often it fails."""
    backoff = Backoff(first_seconds=1, max_seconds=15)
    assert [backoff.seconds(failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [
        1, 2, 4, 8, 15, 15,
    ]  # fmt: skip


class Registry:
    """Takes reports; refuses while `error` is set."""

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
        while not holds():  # noqa: ASYNC110  # a list tells nobody
            await asyncio.sleep(0.01)


async def test_only_what_the_registry_has_not_heard_is_told(registry, reporter):
    """An agent that restarts beside a model that serves says nothing."""
    reporter.heard({"deployments/a": READY})
    reporter.tell("deployments/a", READY)
    reporter.tell("deployments/b", READY)
    await until(lambda: bool(registry.sent))
    await asyncio.sleep(0.05)
    assert registry.sent == [("deployments/b", READY)]


async def test_a_report_is_told_until_the_registry_takes_it(registry, reporter):
    """And then no more."""
    registry.error = grpc.StatusCode.UNAVAILABLE
    reporter.tell("deployments/a", READY)
    await until(lambda: len(registry.sent) >= 2)
    registry.error = None
    taken = len(registry.sent) + 1
    await until(lambda: len(registry.sent) == taken)
    await asyncio.sleep(0.3)
    assert len(registry.sent) == taken


async def test_a_registry_that_has_forgotten_is_told_again(registry, reporter):
    """It was restored from a backup, say."""
    reporter.tell("deployments/a", READY)
    await until(lambda: len(registry.sent) == 1)
    reporter.heard({"deployments/a": LOADING})
    await until(lambda: len(registry.sent) == 2)
    assert registry.sent[-1] == ("deployments/a", READY)


async def test_a_report_that_is_refused_holds_up_no_other(registry, reporter):
    """The deployment is gone; it is not told for ever."""
    registry.error = grpc.StatusCode.NOT_FOUND
    reporter.tell("deployments/gone", READY)
    reporter.tell("deployments/also-gone", READY)
    await until(lambda: len(registry.sent) == 2)
    await asyncio.sleep(0.3)
    assert len(registry.sent) == 2


def stream_of(
    *chunks: bytes,
) -> Callable[[str], AsyncIterator[registry_pb2.DownloadArtifactResponse]]:
    async def stream(_digest: str) -> AsyncIterator[registry_pb2.DownloadArtifactResponse]:
        for chunk in chunks:
            yield registry_pb2.DownloadArtifactResponse(chunk=chunk)

    return stream


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def test_bytes_with_the_right_digest_are_kept(tmp_path):
    """In whatever chunks they come."""
    downloads = Downloads(stream_of(b"one", b"", b"two"), limit_bytes=100)
    await downloads.fetch(digest_of(b"onetwo"), tmp_path / "artifact")
    assert (tmp_path / "artifact").read_bytes() == b"onetwo"


async def test_bytes_with_another_digest_are_not_kept(tmp_path):
    """Both digests are told."""
    downloads = Downloads(stream_of(b"one"), limit_bytes=100)
    with pytest.raises(ArtifactRefused, match=digest_of(b"one")):
        await downloads.fetch(digest_of(b"two"), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


async def test_more_bytes_than_allowed_are_refused_as_they_come(tmp_path):
    """The disk does not fill first."""
    downloads = Downloads(stream_of(b"one", b"two", b"three"), limit_bytes=5)
    with pytest.raises(ArtifactRefused, match="more than 5 bytes"):
        await downloads.fetch(digest_of(b"onetwothree"), tmp_path / "artifact")
    assert (tmp_path / "artifact").stat().st_size <= 5
