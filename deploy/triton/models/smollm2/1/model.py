"""SmolLM2 on Triton: requests wait in a bounded queue for one of the engine's slots.

The contract of inputs, outputs and errors is in this model's README.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own
from contract import ModelError, parse_request
from engine import Engine
from generation import Cancelled, Generation
from stops import Piece

# How often a running request looks whether its caller is still there; each look is a message to
# Triton's process.
_CANCEL_CHECK_SECONDS = 0.03
_STOP_SECONDS = 2.0

_CODES = {
    "INVALID_FIELD": "INVALID_ARG",
    "PROMPT_TOO_LONG": "INVALID_ARG",
    "QUEUE_FULL": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
}


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine. `args` is Triton's description of the model."""
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self._engine = Engine(Path(__file__).parent / "weights.gguf", parameters)
        self._max_waiting = int(parameters["max_waiting"])
        self._waiting: queue.Queue[Any] = queue.Queue(self._max_waiting)
        self._stopping = threading.Event()
        self._workers = [
            threading.Thread(target=self._work, name=f"slot-{number}", daemon=True)
            for number in range(int(parameters["n_parallel"]))
        ]
        for worker in self._workers:
            worker.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; their answers come later, from the workers."""
        for request in requests:
            sender = request.get_response_sender()
            raw = pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0]
            try:
                self._waiting.put_nowait((raw, sender))
            except queue.Full:
                error = ModelError(
                    "QUEUE_FULL",
                    f"{self._max_waiting} requests wait already",
                    queue="engine",
                    limit=self._max_waiting,
                )
                _send_error(sender, error)

    def finalize(self) -> None:
        """Ends what runs and what waits, so that Triton need not wait for it."""
        self._stopping.set()
        deadline = time.monotonic() + _STOP_SECONDS
        for _ in self._workers:
            self._waiting.put(None, timeout=_STOP_SECONDS)
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (taken := self._waiting.get()) is not None:
            self._answer(*taken)

    def _answer(self, raw: bytes, sender: Any) -> None:
        is_cancelled = _CancelCheck(sender, self._stopping)
        try:
            if is_cancelled():
                raise Cancelled  # noqa: TRY301  # one place says goodbye
            request = parse_request(raw)
            if request.operation == "count_tokens":
                count = len(self._engine.tokenize_conversation(request.messages))
                _send(sender, Piece(""), final={"prompt_tokens": count})
                return
            generation = Generation(
                self._engine,
                request,
                send=lambda piece: _send(sender, piece),
                is_cancelled=is_cancelled,
            )
            last, ending = generation.run()
            _send(sender, last, final=asdict(ending))
        except Cancelled:
            _send_error(sender, ModelError("CANCELLED", "the request was cancelled"))
        except ModelError as error:
            _send_error(sender, error)
        except Exception as error:  # noqa: BLE001  # a request must end, whatever happens
            pb_utils.Logger.log_error(f"unexpected: {error!r}")
            _send_error(sender, ModelError("INTERNAL", f"unexpected {type(error).__name__}"))


class _CancelCheck:
    """Asks Triton at most every 30 ms whether the caller has gone."""

    def __init__(self, sender: Any, stopping: threading.Event) -> None:
        self._sender = sender
        self._stopping = stopping
        self._next_seconds = 0.0
        self._cancelled = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._cancelled and now >= self._next_seconds:
            self._next_seconds = now + _CANCEL_CHECK_SECONDS
            self._cancelled = self._stopping.is_set() or self._sender.is_cancelled()
        return self._cancelled


def _send(sender: Any, piece: Piece, *, final: dict[str, Any] | None = None) -> None:
    response = pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text", np.array([piece.text.encode()], np.object_)),
            pb_utils.Tensor("token_ids", np.array(piece.token_ids, np.int32)),
            pb_utils.Tensor("final", np.array([json.dumps(final) if final else ""], np.object_)),
        ]
    )
    if final is None:
        sender.send(response)
    else:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _send_error(sender: Any, error: ModelError) -> None:
    code = getattr(pb_utils.TritonError, _CODES.get(error.reason, "INTERNAL"))
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_json(), code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
