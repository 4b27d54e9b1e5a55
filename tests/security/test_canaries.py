"""Words of requests, answers, keys and tokens are in no log, span, metric, event or file.

Also with debug logs and full tracing, whatever goes wrong. What may have them is said in
`SECURITY.md`: the jobs database as long as a job is kept, and the file of the provider's key.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from deploy.local.ports import address, read_ports
from deploy.local.session import mesh_members
from deploy.triton.command import SHARED_MEMORY, region_prefix
from libs.chat.wire import text_message
from tests.security.canaries import PROVIDER_MODEL, RAISING_MODEL, WORDS, Canaries, Planter
from tests.support.files import files_with
from tests.support.mesh import CollectorThread, RunningMesh
from tests.support.provider import mock_provider

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

# Logs and spans are written in the background.
SETTLE_SECONDS = 3.0
# A job's own payload and result, until it is deleted.
JOB_FILES = ("data/jobs.db", "data/jobs.db-wal")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def planted(mesh: RunningMesh) -> AsyncIterator[Planter]:
    """A tenant whose canaries went through every path of the mesh."""
    async with mock_provider() as provider:
        words = WORDS[provider.base_url] = Canaries()
        planter = Planter(mesh, words, provider)
        await asyncio.to_thread(planter.deploy)
        await planter.plant()
        await asyncio.sleep(SETTLE_SECONDS)
        yield planter


def words_of(planter: Planter) -> dict[str, bytes]:
    return {name: word.encode() for name, word in dataclasses.asdict(planter.words).items()}


async def test_the_canaries_went_through(planted: Planter) -> None:
    """The provider got prompt and key, the tenant its completion: there was something to leak."""
    words, said = planted.words, "".join(planted.answers)
    assert any(words.prompt in str(request) for request in planted.provider.requests)
    assert any(words.api_key in str(headers) for headers in planted.provider.headers)
    assert words.completion in said
    assert words.api_key not in said
    assert planted.statuses["Generate smollm2"] == "INVALID_ARGUMENT"  # the last one was too long
    assert planted.statuses["ModelInfer minilm"] == "INVALID_ARGUMENT"
    assert planted.statuses["Embed"] == "INVALID_ARGUMENT"
    for path in ("Generate", "Embed"):
        assert any(name.endswith(f"/{path}") for name in planted.statuses)


async def test_no_file_has_a_canary(planted: Planter) -> None:
    """Logs, databases, the bus's streams, models, configurations: all below the mesh's folder."""
    home = planted.mesh.layout.home
    found = {
        name: files
        for name, word in words_of(planted).items()
        if (files := [file for file in files_with(home, word) if not is_allowed(name, file)])
    }
    assert found == {}


def is_allowed(name: str, file: str) -> bool:
    """Returns whether `SECURITY.md` says that a file has such a word."""
    if file.startswith("secrets/"):
        return name == "api_key"
    return file in JOB_FILES and name in {"job", "completion"}


async def test_a_deleted_job_leaves_nothing(planted: Planter) -> None:
    """Payload and result are gone from all files, deleted by the command or by the RPC."""
    async with planted.mesh.channel() as channel:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        listed = await stub.ListJobs(jobs_pb2.ListJobsRequest(), metadata=planted.metadata)
        first, *others = listed.jobs
        assert len(others) == 3
        command = ["job", "delete", first.name, "--tenant", "planter", "--json"]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "cli", *command],
            env={**os.environ, "HEADRACE_HOME": str(planted.mesh.layout.home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert json.loads(done.stdout) == {"name": first.name}, done.stderr
        for job in others:
            await stub.DeleteJob(
                jobs_pb2.DeleteJobRequest(name=job.name), metadata=planted.metadata
            )
    words = words_of(planted)
    assert files_with(planted.mesh.layout.home, words["job"], words["completion"]) == []


async def test_no_span_has_a_canary(planted: Planter, collector: CollectorThread) -> None:
    """Names, attributes, events and status, of the edge and of all services."""
    spans = await collector.wait_for(
        lambda spans: {"headrace-edge", "inference", "jobs", "worker"} <= {s.service for s in spans}
    )
    found = {
        f"{name} in {span.service}: {span.name}"
        for span in spans
        for name, word in words_of(planted).items()
        if word in span.serialized
    }
    assert found == set()


async def test_no_metric_has_a_canary(planted: Planter) -> None:
    """Of services, Triton and Envoy, and what Envoy's admin interface says."""
    ports = read_ports(planted.mesh.layout)
    pages = [f"{address(ports, name)}/metrics" for name in ports if name.endswith(".metrics")]
    edges = {"envoy.admin", "envoy.metrics"} & set(ports)
    pages += [f"{address(ports, name)}/stats/prometheus" for name in edges]
    if "envoy.admin" in ports:
        paths = ("stats", "clusters", "config_dump", "listeners", "runtime", "certs")
        pages += [f"{address(ports, 'envoy.admin')}/{path}" for path in paths]
    assert len(pages) >= 9
    found = []
    for page in pages:
        body = await asyncio.to_thread(_read, page)
        found += [f"{name} in {page}" for name, word in words_of(planted).items() if word in body]
    assert found == []


def _read(page: str) -> bytes:
    try:
        with urllib.request.urlopen(f"http://{page}", timeout=10) as answer:  # ours
            return bytes(answer.read())
    except urllib.error.HTTPError:  # Envoy's metrics port has no /metrics
        return b""


async def test_no_process_shows_a_canary(planted: Planter) -> None:
    """Arguments and environments: other accounts of the machine see the former."""
    found = []
    for process in mesh_members(planted.mesh.layout):
        shown = " ".join([*process.cmdline(), *process.environ().values()]).encode()
        found += [name for name, word in words_of(planted).items() if word in shown]
    assert found == []


async def test_no_answer_to_others_has_a_canary(planted: Planter) -> None:
    """Of another tenant and of an operator, also about what failed."""
    mesh = planted.mesh
    eve = mesh.metadata(tenant="evil", user="eve", scopes="infer read")
    operator = mesh.metadata(tenant="ops", user="op", scopes="read registry router operator")
    said: list[str] = []

    async def ask(call: object) -> None:
        try:
            if hasattr(call, "__aiter__"):
                said.extend([str(message) async for message in call])
            else:
                said.append(str(await call))  # type: ignore[misc]  # a unary call
        except grpc.aio.AioRpcError as error:
            said.append(f"{error.details()} {error.trailing_metadata()}")

    async with mesh.channel() as channel:
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        registry = registry_pb2_grpc.RegistryServiceStub(channel)
        for model in ("smollm2", PROVIDER_MODEL, RAISING_MODEL):
            message = text_message(inference_pb2.ROLE_USER, "hello")
            request = inference_pb2.GenerateRequest(model=model, max_tokens=4, messages=[message])
            if model != PROVIDER_MODEL:  # it answers everybody with its canary
                await ask(inference.Generate(request, metadata=eve))
            for who in (eve, operator):
                name = registry_pb2.GetDeploymentRequest(name=f"deployments/{model}-1-0-0")
                await ask(registry.GetDeployment(name, metadata=who))
        for who in (eve, operator):
            await ask(registry.ListDeployments(registry_pb2.ListDeploymentsRequest(), metadata=who))
        embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        texts = embedding_pb2.EmbedRequest(model="minilm", texts=["hello"])
        await ask(embedding.Embed(texts, metadata=eve))
        jobs = jobs_pb2_grpc.JobServiceStub(channel)
        full = jobs_pb2.ListJobsRequest(view=jobs_pb2.JOB_VIEW_FULL)
        await ask(jobs.ListJobs(full, metadata=eve))
        cost = cost_pb2_grpc.CostServiceStub(channel)
        await ask(cost.QueryUsage(cost_pb2.QueryUsageRequest(), metadata=eve))
    text = "".join(said)
    assert "deployments/" in text
    assert [name for name, word in words_of(planted).items() if word.decode() in text] == []


async def test_files_are_private_and_bounded(planted: Planter) -> None:
    """Nobody else may read a file of the mesh; logs are rotated."""
    home = planted.mesh.layout.home
    own = [home / name for name in ("data", "keys", "logs", "nats", "run", "secrets")]
    paths = [path for folder in own for path in folder.rglob("*") if not path.is_symlink()]
    assert len(paths) > 30
    assert [path for path in (*own, *paths) if path.stat().st_mode & 0o077] == []
    # Models may be read by Triton's user, if it has one.
    others = [path for path in home.iterdir() if path.is_dir() and path.name != "triton"]
    assert [path for path in others if path.stat().st_mode & 0o077] == []
    # Tensors pass through these between Triton and the processes of models.
    regions = list(SHARED_MEMORY.glob(f"{region_prefix(home / 'triton' / 'triton-0')}*"))
    assert regions
    assert [region for region in regions if region.stat().st_mode & 0o077] == []
    config = (home / "run" / "supervisord.conf").read_text()
    programs = config.count("[program:")
    assert programs > 8
    assert config.count("stdout_logfile_maxbytes=10485760") == programs
