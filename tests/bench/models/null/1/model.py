"""A decoupled model that computes nothing. A number as first message is the pause in ms."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answers with the same token `max_tokens` times."""

    def execute(self, requests):
        """Streams each request from its own thread."""
        for request in requests:
            raw = pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0]
            sender = request.get_response_sender()
            threading.Thread(target=_stream, args=(json.loads(raw), sender), daemon=True).start()


def _stream(body, sender):
    if body.get("operation") == "count_tokens":  # the readiness check of the pool agent
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(_response("", [], json.dumps({"prompt_tokens": 1})), flags=flags)
        return
    done = sum(1 for _ in (body.get("resume") or {}).get("pieces", []))
    content = body["messages"][0]["content"]
    pause_seconds = int(content) / 1000 if content.isdecimal() else 0.0
    for index in range(done, body["max_tokens"]):
        if pause_seconds:
            time.sleep(pause_seconds)
        if sender.is_cancelled():
            break
        sender.send(_response("word ", [index + 1], ""))
    final = {
        "finish_reason": "length",
        "prompt_tokens": 1,
        "completion_tokens": body["max_tokens"],
        "cached_tokens": 0,
    }
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(_response("", [], json.dumps(final)), flags=flags)


def _response(text, ids, final):
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text", np.array([text.encode()], np.object_)),
            pb_utils.Tensor("token_ids", np.array(ids, np.int32)),
            pb_utils.Tensor("final", np.array([final.encode()], np.object_)),
        ]
    )
