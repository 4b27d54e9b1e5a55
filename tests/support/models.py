"""Deploys small models, written by a test, on a running mesh."""

from __future__ import annotations

import json

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from deploy.client.costs import PER_MILLION
from deploy.client.deployer import DEPLOY_SCOPES, Deployer
from deploy.local.edge import connect
from deploy.triton.artifact import BundledModel, write_artifact
from tests.support.mesh import RunningMesh, SilentProgress

# A chat model in Python without a tokenizer.
CHAT_CONFIG = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "request" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "text" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "token_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "final" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
_SCHEMAS = {
    "chat": {"context_tokens": 1024, "max_output_tokens": 1024, "preprocessing": {}},
    "embedding": {"dimensions": 4, "max_input_tokens": 256, "preprocessing": {}},
}


def deploy(
    mesh: RunningMesh, model: str, *, kind: str, code: str, config: str, version: str = "1.0.0"
) -> None:
    """Registers, prices and deploys a model, and returns when it answers."""
    folder = mesh.layout.home / "cache" / model
    (folder / "1").mkdir(parents=True, exist_ok=True)
    contents = {
        "headrace.json": json.dumps({"kind": kind, **_SCHEMAS[kind]}),
        "config.pbtxt": config,
        "1/model.py": code,
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    artifact = folder.with_suffix(".tar")
    digest = write_artifact({name: folder / name for name in contents}, artifact)
    packed = BundledModel(model=model, version=version, kind=kind, artifact=artifact, digest=digest)
    rate = cost_pb2.Rate(
        kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=1_000_000, per_quantity=PER_MILLION
    )
    price = cost_pb2.Price(name=f"prices/{model}-1", model=model, rates=[rate])
    with connect(mesh.layout, tenant="acme", user="operator", scopes=DEPLOY_SCOPES) as edge:
        deployer = Deployer(edge, SilentProgress())
        deployer.deploy(packed, price=price)
        deployer.wait_until_ready(packed)
