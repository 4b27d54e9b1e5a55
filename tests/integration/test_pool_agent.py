"""The pool agent with a real registry and a real Triton."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.support.pool import (
    ECHO,
    WAIT_SECONDS,
    RunningPool,
    has_failed,
    is_loading,
    is_ready,
    pack_model,
    running_pool,
)
from tests.support.registry import digest_of
from tests.support.triton_server import RunningTriton, infer_request, running_triton

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTriton]:
    with running_triton(tmp_path_factory.mktemp("triton")) as running:
        yield running


@pytest.fixture
async def pool(tmp_path: Path, triton: RunningTriton) -> AsyncIterator[RunningPool]:
    if triton.process is None or triton.process.poll() is not None:
        triton.start()
    async with running_pool(tmp_path, triton) as running:
        yield running


async def ask(triton: RunningTriton, backend_model: str) -> float:
    """Returns the number of a model."""
    async with grpc.aio.insecure_channel(triton.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = await stub.ModelInfer(infer_request(backend_model, "text", [b"x"], [1, 1]))
    (value,) = struct.unpack("<f", answer.raw_output_contents[0])
    return float(value)


async def until(triton: RunningTriton, holds: Callable[[set[str]], bool]) -> None:
    """Waits for Triton to have the right models loaded, by name."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not holds(await loaded(triton)):  # noqa: ASYNC110  # Triton has no event
            await asyncio.sleep(0.1)


async def loaded(triton: RunningTriton) -> set[str]:
    async with grpc.aio.insecure_channel(triton.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.RepositoryIndexRequest(ready=True)
        index = await stub.RepositoryIndex(request, metadata=triton.control)
    return {model.name for model in index.models}


async def test_a_deployed_version_serves_and_is_reported_with_its_digest(pool, tmp_path):
    """From the deployment in the registry to an answer of the model."""
    artifact = pack_model(tmp_path / "a", value=7)
    deployment = await pool.deploy("alpha", "1.0.0", artifact)
    backend = await pool.ready(deployment)
    assert backend.status.artifact_digest == digest_of(artifact)
    assert backend.triton.address == pool.triton.address
    assert backend.triton.model == f"alpha-1.0.0-{digest_of(artifact)[7:19]}"
    assert await ask(pool.triton, backend.triton.model) == 7


async def test_versions_are_served_side_by_side(pool, tmp_path):
    """A new one does not replace an old one."""
    names = [
        await pool.deploy("alpha", version, pack_model(tmp_path / version, value=value))
        for value, version in enumerate(["1.0.0", "2.0.0-rc.1", "2.0.0"])
    ]
    backends = [await pool.ready(name) for name in names]
    answers = [await ask(pool.triton, backend.triton.model) for backend in backends]
    assert answers == [0, 1, 2]


async def test_an_updated_deployment_loads_its_new_version_before_it_unloads_the_old_one(
    pool, tmp_path
):
    """Requests to the old version can end, and the new one is reported with its own artifact."""
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "1", value=1))
    old = await pool.ready(deployment)
    slow = ECHO.replace("class", "import time\ntime.sleep(2)\n\nclass")
    digest = await pool.client.upload(pack_model(tmp_path / "2", code=slow, value=2))
    version = "models/alpha/versions/2.0.0"
    await pool.client.create_version(version, digest)
    await pool.client.update(deployment, version=version)
    await pool.backend(deployment, is_loading)
    assert await ask(pool.triton, old.triton.model) == 1
    new = await pool.ready(deployment)
    assert new.status.artifact_digest == digest
    assert await ask(pool.triton, new.triton.model) == 2
    await until(pool.triton, lambda names: names == {new.triton.model})
    await pool.removed_from_disk(old.triton.model)


async def test_an_undeployed_version_is_removed_from_triton_and_from_the_disk(pool, tmp_path):
    """The other version stays."""
    old = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "1", value=1))
    new = await pool.deploy("alpha", "2.0.0", pack_model(tmp_path / "2", value=2))
    removed, kept = [(await pool.ready(name)).triton.model for name in (old, new)]
    await pool.client.undeploy(old)
    await until(pool.triton, lambda names: removed not in names)
    await pool.removed_from_disk(removed)
    assert await ask(pool.triton, kept) == 2


async def test_a_failing_artifact_is_reported_and_does_not_delay_others(pool, tmp_path):
    """The reason is Triton's; the other version is ready meanwhile."""
    broken = pack_model(tmp_path / "broken", code="raise ValueError('no such weights')")
    bad = await pool.deploy("bad", "1.0.0", broken)
    good = await pool.deploy("good", "1.0.0", pack_model(tmp_path / "good"))
    await pool.ready(good)
    backend = await pool.backend(bad, has_failed)
    assert "no such weights" in backend.status.message
    again = await pool.backend(bad, lambda backend: "try 2" in backend.status.message)
    assert has_failed(again)


async def test_an_artifact_that_leads_out_of_its_folder_is_refused(pool, tmp_path):
    """When its version is made: no agent ever fetches it."""
    evil = pack_model(tmp_path / "evil")
    evil = evil.replace(b"1/weights\0\0\0", b"../../evil\0\0")
    evil = _with_checksums(evil)
    with pytest.raises(grpc.aio.AioRpcError, match="leads out of its folder"):
        await pool.deploy("evil", "1.0.0", evil)
    assert not list(pool.triton.home.rglob("evil"))


async def test_a_killed_triton_gets_its_models_back(pool, tmp_path):
    """It is noticed, reported and loaded again within seconds."""
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "a", value=3))
    backend = await pool.ready(deployment)
    started = time.monotonic()
    pool.triton.kill()
    await pool.backend(deployment, is_loading)
    pool.triton.start()
    await pool.ready(deployment)
    assert time.monotonic() - started < 10
    assert await ask(pool.triton, backend.triton.model) == 3


async def test_a_triton_that_restarts_needs_no_registry(pool, tmp_path):
    """What was fetched is on the disk."""
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "a", value=4))
    backend = await pool.ready(deployment)
    await pool.registry.kill()
    pool.triton.kill()
    pool.triton.start()
    await until(pool.triton, lambda names: backend.triton.model in names)
    assert await ask(pool.triton, backend.triton.model) == 4
    await pool.registry.start()
    await pool.ready(deployment)


async def test_a_killed_agent_does_not_disturb_what_serves(pool, tmp_path):
    """The registry gets no new report, and the model is not loaded again."""
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "a"))
    backend = await pool.ready(deployment)
    stub = pool.triton.stub_of(backend.triton.model)
    await pool.agent.kill()
    changed = asyncio.ensure_future(pool.backend(deployment, lambda backend: not is_ready(backend)))
    await pool.agent.start()
    await pool.agent.healthy()
    await asyncio.sleep(2)
    assert not changed.done()
    changed.cancel()
    assert pool.triton.stub_of(backend.triton.model) == stub
    assert await ask(pool.triton, backend.triton.model) == 1


@pytest.mark.parametrize("after_seconds", [0.05, 0.3, 0.8])
async def test_an_agent_that_is_killed_while_it_loads_converges(pool, tmp_path, after_seconds):
    """Whatever it was doing: nothing incomplete is served."""
    weights = bytes(30_000_000)
    artifact = pack_model(tmp_path / "a", value=5, weights=weights)
    deployment = await pool.deploy("alpha", "1.0.0", artifact)
    await asyncio.sleep(after_seconds)
    await pool.agent.kill()
    await pool.agent.start()
    backend = await pool.ready(deployment)
    assert await ask(pool.triton, backend.triton.model) == 5
    assert not list((pool.triton.repository / ".incoming").iterdir())


async def test_a_file_that_changed_on_the_disk_is_not_served(pool, tmp_path):
    """An agent that starts checks that the files are the verified ones."""
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "a", value=6))
    backend = await pool.ready(deployment)
    await pool.agent.kill()
    code = pool.triton.repository / backend.triton.model / "1" / "model.py"
    code.write_text(code.read_text().replace("6", "666"))
    await pool.agent.start()
    await pool.backend(deployment, is_loading)
    await pool.ready(deployment)
    assert await ask(pool.triton, backend.triton.model) == 6


async def test_versions_without_a_deployment_are_unloaded(pool, tmp_path):
    """Also what something else loaded, or before the agent was started."""
    await pool.agent.kill()
    pool.triton.link_model("minilm", name="stranger")
    pool.triton.load("stranger")
    deployment = await pool.deploy("alpha", "1.0.0", pack_model(tmp_path / "a"))
    await pool.agent.start()
    backend = await pool.ready(deployment)
    await until(pool.triton, lambda names: names == {backend.triton.model})


async def test_a_version_that_is_deployed_again_at_once_serves(pool, tmp_path):
    """Unloading and loading of the same version do not overtake each other."""
    artifact = pack_model(tmp_path / "a", value=8)
    deployment = await pool.deploy("alpha", "1.0.0", artifact)
    await pool.ready(deployment)
    await pool.client.undeploy(deployment)
    await asyncio.sleep(0.05)
    await pool.client.deploy("deployments/again", "models/alpha/versions/1.0.0")
    backend = await pool.ready("deployments/again")
    await asyncio.sleep(1)
    assert await ask(pool.triton, backend.triton.model) == 8


def _with_checksums(tar: bytes) -> bytes:
    """Fixes the checksums of a tar whose file names were changed."""
    blocks = [bytearray(tar[at : at + 512]) for at in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(map(bytes, blocks))
