"""The models that come with Headrace, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from headrace.cost.v1 import cost_pb2

from deploy.errors import CliError
from deploy.local.deployer import Deployer, Progress
from deploy.local.edge_client import EdgeClient, describe
from deploy.local.layout import Layout
from deploy.triton.artifact import bundled_models

# Nano-USD for a million tokens: of input, of cached input, of output.
_PRICES: Mapping[str, tuple[int, int, int]] = {
    "smollm2": (100_000_000, 25_000_000, 400_000_000),
    "minilm": (20_000_000, 2_000_000, 0),
}
_DESCRIPTIONS: Mapping[str, str] = {
    "smollm2": "SmolLM2-135M-Instruct, a small chat model",
    "minilm": "all-MiniLM-L6-v2, sentence embeddings of 384 dimensions",
}


def deploy_bundled_models(layout: Layout, progress: Progress) -> None:
    """Registers, prices and deploys what is not yet, and returns when all of it answers.

    Raises:
        CannotRun: a model does not come up.
        ArtifactUnavailable: weights are missing.
    """
    models = bundled_models(layout.home)
    with EdgeClient(layout, tenant="headrace", user="operator", scopes="infer admin") as edge:
        deployer = Deployer(edge, progress)
        try:
            for model in models:
                deployer.bring(
                    model, price=_price(model.model), description=_DESCRIPTIONS[model.model]
                )
            for model in models:
                deployer.await_ready(model)
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error


def _price(model: str) -> cost_pb2.Price:
    whole, cached, output = _PRICES[model]
    return cost_pb2.Price(
        name=f"prices/{model}-1",
        model=model,
        input_nano_usd_per_million_tokens=whole,
        cached_input_nano_usd_per_million_tokens=cached,
        output_nano_usd_per_million_tokens=output,
    )
