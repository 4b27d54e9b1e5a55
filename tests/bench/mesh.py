"""Starts a mesh to measure: real processes with the default features of a user's mesh."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from deploy.client.deployer import DEPLOY_SCOPES, Deployer
from deploy.local.edge import connect
from deploy.local.ports import read_ports
from deploy.triton.artifact import BundledModel, write_artifact
from tests.bench.proc import cpu_seconds
from tests.support.mesh import CollectorThread, RunningMesh, SilentProgress, running_mesh

TRACE_SAMPLE_PERCENT = "10"
VERSION = "1.0.0"  # of models that benchmarks deploy
CONDITIONS = "JWT, route, usage event, metrics, 10 % traces on"


@contextmanager
def bench_mesh() -> Iterator[RunningMesh]:
    """Starts a mesh with a trace collector and without models."""
    before = dict(os.environ)
    with CollectorThread() as collector, tempfile.TemporaryDirectory(prefix="hrb") as home:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.endpoint
        os.environ["HEADRACE_TRACE_SAMPLE_PERCENT"] = TRACE_SAMPLE_PERCENT
        try:
            with running_mesh(Path(home), models=False) as mesh:
                yield mesh
        finally:
            os.environ.clear()
            os.environ.update(before)


def port_of(mesh: RunningMesh, name: str) -> int:
    """Returns a port of the mesh by its name, such as `triton-0.metrics`."""
    return read_ports(mesh.layout)[name]


def hot_path_cpu_seconds(mesh: RunningMesh) -> float:
    """Returns the CPU seconds so far of edge and inference, with their children."""
    return cpu_seconds([mesh.pid("envoy"), mesh.pid("inference")])


def deploy(
    mesh: RunningMesh, model: str, files: Mapping[str, Path], *, version: str = VERSION
) -> str:
    """Registers, prices and deploys a model; returns its digest when the model answers."""
    artifact = mesh.layout.home / "cache" / f"{model}-{version}.tar"
    digest = write_artifact(files, artifact)
    bundled = BundledModel(
        model=model, version=version, kind="chat", artifact=artifact, digest=digest
    )
    with connect(mesh.layout, tenant="acme", user="operator", scopes=DEPLOY_SCOPES) as edge:
        deployer = Deployer(edge, SilentProgress())
        price = cost_pb2.Price(
            name=f"prices/{model}-1",
            model=model,
            rates=[
                cost_pb2.Rate(kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=100_000_000),
                cost_pb2.Rate(kind=usage_pb2.USAGE_KIND_COMPLETION_TOKENS, nano_usd=400_000_000),
            ],
        )
        deployer.deploy(bundled, price=price, deployment=f"{model}-{version.replace('.', '-')}")
        deployer.wait_until_ready(bundled)
    return digest


def deploy_provider(
    mesh: RunningMesh, model: str, base_url: str, *, api_key_name: str = ""
) -> None:
    """Deploys a chat model of an external provider."""
    manifest = mesh.layout.home / "cache" / f"{model}.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(
        json.dumps(
            {
                "kind": "chat",
                "context_tokens": 8192,
                "max_output_tokens": 4096,
                "provider": {"base_url": base_url, "model": "mock", "api_key_name": api_key_name},
            }
        )
    )
    deploy(mesh, model, {"headrace.json": manifest})
