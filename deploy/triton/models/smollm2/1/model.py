"""SmolLM2 on Triton: requests wait in a bounded queue for one of the engine's slots.

Its contract is in `deploy/triton/README.md`.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own
from contract import ModelError, Request, parse_request
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
        self._stopping = threading.Event()
        self._slots = _Queue(int(parameters["max_waiting"]))
        self._counting = _Queue(int(parameters["max_waiting"]))
        # Counting needs no slot; it shall not wait behind answers that do.
        self._workers = [
            threading.Thread(target=self._work, args=(waiting,), daemon=True)
            for waiting in (*[self._slots] * int(parameters["n_parallel"]), self._counting)
        ]
        for worker in self._workers:
            worker.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; their answers come later, from the workers."""
        for each in requests:
            sender = each.get_response_sender()
            try:
                raw = pb_utils.get_input_tensor_by_name(each, "request").as_numpy()[0]
                request = parse_request(raw, cache_salt=_cache_salt(each))
                counts = request.operation == "count_tokens"
                (self._counting if counts else self._slots).put((request, sender))
            except Exception as error:  # noqa: BLE001  # would fail the others, too
                _send_error(sender, _model_error(error))

    def finalize(self) -> None:
        """Ends what runs and what waits, so that Triton need not wait for it."""
        self._stopping.set()
        deadline = time.monotonic() + _STOP_SECONDS
        for waiting in (self._slots, self._counting):
            waiting.close()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _work(self, waiting: _Queue) -> None:
        while (taken := waiting.get()) is not None:
            self._answer(*taken)

    def _answer(self, request: Request, sender: Any) -> None:
        is_cancelled = _CancelCheck(sender, self._stopping)
        try:
            if is_cancelled():
                raise Cancelled  # noqa: TRY301  # one place says goodbye
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
        except Exception as error:  # noqa: BLE001  # a request must end, whatever happens
            _send_error(sender, _model_error(error))


class _Queue:
    """Requests that wait, at most so many, in their order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: queue.SimpleQueue[tuple[Request, Any] | None] = queue.SimpleQueue()

    def put(self, request: tuple[Request, Any]) -> None:
        """Lets a request wait.

        Raises:
            ModelError: QUEUE_FULL.
        """
        if self._waiting.qsize() >= self._limit:
            raise ModelError(
                "QUEUE_FULL",
                f"{self._limit} requests wait already",
                queue="engine",
                limit=self._limit,
            )
        self._waiting.put(request)

    def get(self) -> tuple[Request, Any] | None:
        """Returns the next request, or None when there will be no more."""
        taken = self._waiting.get()
        if taken is None:
            self._waiting.put(None)  # for the next worker
        return taken

    def close(self) -> None:
        """Lets `get` return None behind the last request."""
        self._waiting.put(None)


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


def _cache_salt(request: Any) -> str:
    """Returns the parameter by which the mesh separates the prefix caches of tenants."""
    salt = json.loads(request.parameters() or "{}").get("cache_salt")
    return salt if isinstance(salt, str) else ""


def _model_error(error: Exception) -> ModelError:
    """Returns an error in the contract. Texts of unexpected ones may quote the prompt."""
    if isinstance(error, ModelError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(each.filename).name}:{each.lineno}" for each in frames)
    return ModelError("INTERNAL", f"unexpected {type(error).__name__} at {where}")


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
