"""Turns texts into vectors on a GPU, in bfloat16: mean over the tokens, unit length.

Errors are Triton errors whose message is JSON: {"reason", "message", "metadata"}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own
from batches import batches
from transformers import AutoModel, AutoTokenizer

# Triton passes batches from one thread; more threads do not help with short texts.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class TritonPythonModel:
    """One instance of the model, on one GPU; Triton calls it from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads tokenizer and network. `args` is Triton's description of the model."""
        config = json.loads(args["model_config"])
        parameters = {
            key: int(value["string_value"]) for key, value in config["parameters"].items()
        }
        weights = Path(__file__).parent / "weights"
        on_gpu = args["model_instance_kind"] == "GPU"
        self._device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        self._max_input_tokens = parameters["max_input_tokens"]
        self._max_run_tokens = parameters["max_run_tokens"]
        self._tokenizer = AutoTokenizer.from_pretrained(weights)
        self._network = AutoModel.from_pretrained(weights).to(self._device, torch.bfloat16).eval()
        configured = next(each for each in config["output"] if each["name"] == "embedding")["dims"]
        if [self._network.config.hidden_size] != [int(size) for size in configured]:
            message = f"the weights return vectors of {self._network.config.hidden_size}"
            raise pb_utils.TritonModelException(f"{message}; config.pbtxt says {configured}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers a batch of requests, each with texts [n, 1]."""
        texts = [_texts_of(request) for request in requests]
        embeddings, token_counts = self._embed([text for some in texts if some for text in some])
        responses = []
        start = 0
        for some in texts:
            if some is None:
                responses.append(pb_utils.InferenceResponse(error=_not_utf8()))
                continue
            rows = slice(start, start + len(some))
            start = rows.stop
            tensors = [
                pb_utils.Tensor("embedding", embeddings[rows]),
                pb_utils.Tensor("token_count", token_counts[rows]),
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses

    def _embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns [n, dimensions] float32, each row of unit length, and [n, 1] int32 counts."""
        size = self._network.config.hidden_size
        if not texts:
            return np.empty((0, size), np.float32), np.empty((0, 1), np.int32)
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_input_tokens)
        ids = encoded["input_ids"]
        lengths = [len(each) for each in ids]
        embeddings = np.empty((len(texts), size), np.float32)
        for places in batches(lengths, max_run_tokens=self._max_run_tokens):
            embeddings[places] = self._run([ids[place] for place in places])
        return embeddings, np.array(lengths, np.int32).reshape(-1, 1)

    @torch.inference_mode()
    def _run(self, encoded: list[list[int]]) -> np.ndarray:
        padded = self._tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self._device)
        hidden = self._network(**padded).last_hidden_state
        # In float32, because a sum over 256 tokens in bfloat16 has only two correct digits.
        mask = padded["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden.float() * mask).sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


def _texts_of(request: Any) -> list[str] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
    try:
        return [value.decode() for value in tensor.reshape(-1)]
    except UnicodeDecodeError:
        return None


def _not_utf8() -> Any:
    message = {
        "reason": "INVALID_FIELD",
        "message": "text: must be UTF-8",
        "metadata": {"field": "text"},
    }
    return pb_utils.TritonError(json.dumps(message), pb_utils.TritonError.INVALID_ARG)
