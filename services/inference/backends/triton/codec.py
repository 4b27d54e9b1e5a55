"""The tensors of Headrace's models on Triton: requests as messages, answers as plain data.

A chat model takes one JSON object in the tensor `request`. Each response has `text`, `token_ids`
(int32; negative where the engine does not report an id) and `final`, which is empty until the
last one: then a JSON object with the numbers of tokens. An embedding model takes `text` and
returns `embedding` (float32) and `token_count` (int32), one row per text.

What a model adds to its answers is skipped; what is missing or malformed is the backend's fault.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from libs.chat.request import Message
from services.inference.backends.counts import token_count
from services.inference.backends.triton.errors import triton_error
from services.inference.domain import (
    BackendFailedError,
    ChatCall,
    Chunk,
    Delivered,
    Finish,
)

# The parameter of a request by which a chat model keeps the prefix caches of tenants apart.
CACHE_SALT = "cache_salt"

# Precedes each element of a tensor of the type BYTES.
LENGTH = struct.Struct("<I")

_MALFORMED = (DecodeError, KeyError, ValueError, struct.error)


def chat_request(
    backend_model: str, call: ChatCall, *, max_tokens: int, delivered: Delivered
) -> bytes:
    """Returns the request for an answer, or for the rest of one of which a part was delivered."""
    request = call.request
    body = {
        "messages": _messages(request.messages),
        "max_tokens": max_tokens,  # of the whole answer
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop),
        "resume": {"pieces": delivered.segments} if delivered.segments else None,
    }
    return _json_request(
        backend_model, body, request_id=call.request_id, cache_salt=call.cache_salt
    )


def count_request(backend_model: str, messages: Sequence[Message]) -> bytes:
    """Returns the request for the number of tokens of a conversation."""
    return _json_request(
        backend_model, {"operation": "count_tokens", "messages": _messages(messages)}
    )


def embed_request(backend_model: str, texts: Sequence[str]) -> bytes:
    """Returns the request for the embeddings of texts."""
    request = service_pb2.ModelInferRequest(
        model_name=backend_model,
        inputs=[_tensor("text", [len(texts), 1])],
        raw_input_contents=[b"".join(_bytes_element(text.encode()) for text in texts)],
    )
    return _serialized(request)


def read_chunk(message: bytes) -> Chunk:
    """Reads a `ModelStreamInferResponse` of a chat model.

    Raises:
        BackendFailedError: it is malformed, or reports a failure of the backend.
        HeadraceError: the model refuses the request.
    """
    try:
        outputs = _stream_outputs(message)
        if not outputs:  # Triton's own empty final response
            return Chunk("")
        raw_ids = outputs["token_ids"]
        all_ids = struct.unpack(f"<{len(raw_ids) // 4}i", raw_ids)
        ids = (
            tuple(each for each in all_ids if each >= 0) if min(all_ids, default=0) < 0 else all_ids
        )
        final = outputs["final"]
        return Chunk(
            outputs["text"][LENGTH.size :].decode(),
            ids,
            len(all_ids),
            _finish(read_final(final[LENGTH.size :])) if len(final) > LENGTH.size else None,
        )
    except _MALFORMED as error:
        raise malformed(error) from error


def read_prompt_tokens(message: bytes) -> int | None:
    """Reads a `ModelStreamInferResponse` to `count_request`; None: the number comes later.

    Raises:
        BackendFailedError: it is malformed, or reports a failure of the backend.
        HeadraceError: the model refuses the request.
    """
    try:
        final = _stream_outputs(message).get("final", b"")[LENGTH.size :]
    except _MALFORMED as error:
        raise malformed(error) from error
    return _count(read_final(final), "prompt_tokens") if final else None


def read_embeddings(message: bytes, *, texts: int) -> list[tuple[bytes, int]]:
    """Reads a `ModelInferResponse` of an embedding model.

    Returns:
        For each text its vector, as little-endian float32, and its number of tokens.

    Raises:
        BackendFailedError: it is malformed, or not about so many texts.
    """
    try:
        outputs = _outputs(service_pb2.ModelInferResponse.FromString(message))
        vectors = outputs["embedding"]
        counts = struct.unpack(f"<{texts}i", outputs["token_count"])
        if not vectors or len(vectors) % (4 * texts) or min(counts) < 0:
            raise ValueError(f"not {texts} vectors with their numbers of tokens")
    except _MALFORMED as error:
        raise malformed(error) from error
    size = len(vectors) // texts
    return [
        (vectors[index * size : (index + 1) * size], count) for index, count in enumerate(counts)
    ]


def read_final(final: bytes) -> Mapping[str, Any]:
    """Reads what `final` holds at the end of an answer.

    Raises:
        BackendFailedError: it is not a JSON object.
    """
    try:
        fields = json.loads(final)
    except (ValueError, RecursionError) as error:
        raise BackendFailedError(
            f"the model ended its answer with invalid JSON: {error}"
        ) from error
    if not isinstance(fields, dict):
        raise BackendFailedError("the model ended its answer with JSON that is not an object")
    return fields


def finish_of(fields: Mapping[str, Any]) -> Finish | None:
    """Returns how an answer ended; None: its tokens were counted, none was generated.

    Raises:
        BackendFailedError: a field is missing or has another type.
    """
    return _finish(fields) if "completion_tokens" in fields else None


def malformed(error: Exception) -> BackendFailedError:
    """Returns the failure of a backend whose message cannot be read."""
    return BackendFailedError(f"the backend sent a malformed response: {error!r}")


def _finish(fields: Mapping[str, Any]) -> Finish:
    reason = fields.get("finish_reason")
    if not reason or not isinstance(reason, str):
        raise BackendFailedError("the model ended its answer without a valid finish_reason")
    return Finish(
        reason,
        _count(fields, "prompt_tokens"),
        _count(fields, "completion_tokens"),
        _count(fields, "cached_tokens"),
    )


def _count(fields: Mapping[str, Any], name: str) -> int:
    count = token_count(fields.get(name))
    if count is None:
        raise BackendFailedError(f"the model ended its answer without a valid {name}")
    return count


def _stream_outputs(message: bytes) -> Mapping[str, bytes]:
    response = service_pb2.ModelStreamInferResponse.FromString(message)
    if response.error_message:
        raise triton_error(response.error_message, request_id=response.infer_response.id)
    return _outputs(response.infer_response)


def _outputs(response: Any) -> Mapping[str, bytes]:
    return {
        output.name: raw
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _json_request(
    backend_model: str, body: object, *, request_id: str = "", cache_salt: str = ""
) -> bytes:
    request = service_pb2.ModelInferRequest(
        model_name=backend_model,
        id=request_id,
        inputs=[_tensor("request", [1])],
        raw_input_contents=[_bytes_element(json.dumps(body).encode())],
    )
    if cache_salt:
        request.parameters[CACHE_SALT].string_param = cache_salt
    return _serialized(request)


def _tensor(name: str, shape: list[int]) -> Any:
    return service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=shape)


def _bytes_element(value: bytes) -> bytes:
    return LENGTH.pack(len(value)) + value


def _serialized(request: Any) -> bytes:
    serialized: bytes = request.SerializeToString()
    return serialized
