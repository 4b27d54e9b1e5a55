"""Turns texts into vectors: tokenize, run in batches of like length, mean over tokens, unit length.

Errors are Triton errors whose message is JSON: {"reason", "message", "metadata"}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own
from tokenizers import Tokenizer

_DIMENSIONS = 384

# Texts are few and short; a pool of threads for them would take the cores from the network.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class TritonPythonModel:
    """One instance of the model; Triton calls it from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads tokenizer and network. `args` is Triton's description of the model."""
        parameters = {
            key: int(value["string_value"])
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        folder = Path(__file__).parent
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(parameters["max_input_tokens"])
        self._tokenizer = tokenizer
        self._max_rows = parameters["max_rows"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = parameters["threads"] or default_threads()
        options.inter_op_num_threads = 1
        # Threads that spin between runs would take the cores from the neighbours.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers requests that Triton batched, each of texts [n, 1]."""
        texts: list[list[str] | None] = [_texts_of(request) for request in requests]
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
        """Returns [n, 384] float32, each row of unit length, and [n, 1] int32 token counts."""
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        embeddings = np.empty((len(texts), _DIMENSIONS), np.float32)
        token_counts = np.array([[len(ids)] for ids in encoded], np.int32).reshape(-1, 1)
        by_length = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
        for start in range(0, len(by_length), self._max_rows):
            rows = by_length[start : start + self._max_rows]
            embeddings[rows] = self._run([encoded[row] for row in rows])
        return embeddings, token_counts

    def _run(self, encoded: list[list[int]]) -> np.ndarray:
        shape = (len(encoded), max(map(len, encoded)))
        input_ids = np.zeros(shape, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        (hidden,) = self._session.run(
            ["last_hidden_state"],
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": np.zeros(shape, np.int64),
            },
        )
        # The mean's divisor falls out when the length is made 1.
        pooled = np.einsum("rth,rt->rh", hidden, attention_mask.astype(np.float32))
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def default_threads() -> int:
    """Returns half of the cores that this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


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
