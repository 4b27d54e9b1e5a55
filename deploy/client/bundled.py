"""The models that come with Headrace, with their descriptions and prices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import grpc
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from deploy.client.costs import PER_MILLION
from deploy.client.deployer import Deployer, DeployProgress
from deploy.client.edge import EdgeClient, describe
from deploy.errors import CliError
from deploy.triton.artifact import bundled_models

_KINDS = (
    usage_pb2.USAGE_KIND_PROMPT_TOKENS,
    usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS,
    usage_pb2.USAGE_KIND_COMPLETION_TOKENS,
)
# Nano-USD per million tokens, for each of `_KINDS`.
_PRICES: Mapping[str, tuple[int, int, int]] = {
    "smollm2": (100_000_000, 25_000_000, 400_000_000),
    "minilm": (20_000_000, 2_000_000, 0),
}
_DESCRIPTIONS: Mapping[str, str] = {
    "smollm2": "SmolLM2-135M-Instruct, a small chat model",
    "minilm": "all-MiniLM-L6-v2, sentence embeddings of 384 dimensions",
}


def deploy_bundled_models(edge: EdgeClient, *, home: Path, progress: DeployProgress) -> None:
    """Registers, prices and deploys the bundled models and returns when all of them answer.

    Deployments of earlier bundled versions are updated; all else that exists is left unchanged.

    Args:
        edge: a client whose token has the scopes `Deployer` needs.
        home: the packed models are kept in its folder `cache`.
        progress: called as the models come up.

    Raises:
        CliError: a model does not become ready.
        ArtifactUnavailableError: weights are missing.
    """
    models = bundled_models(home)
    deployer = Deployer(edge, progress)
    try:
        for model in models:
            deployer.deploy(
                model, price=_price(model.model), description=_DESCRIPTIONS[model.model]
            )
        for model in models:
            deployer.wait_until_ready(model)
    except grpc.RpcError as error:
        raise CliError(describe(error)) from error


def _price(model: str) -> cost_pb2.Price:
    return cost_pb2.Price(
        name=f"prices/{model}-1",
        model=model,
        rates=[
            cost_pb2.Rate(kind=kind, nano_usd=nano_usd, per_quantity=PER_MILLION)
            for kind, nano_usd in zip(_KINDS, _PRICES[model], strict=True)
        ],
    )
