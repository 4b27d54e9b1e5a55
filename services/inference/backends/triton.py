"""Triton as a backend: raw tensors in, pieces out.

Streams are read as bytes by `libs.grpc_stream`, since each message's way through Python is what
costs. Each request has a stream of its own, so that a cancelled call cancels the generation.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import grpc
from opentelemetry import propagate
from tritonclient.grpc import service_pb2

from libs.chat.request import Message
from libs.errors import BY_CODE, HeadraceError
from libs.grpc_stream import ServerStreamCall, ServerStreamClient, ServerStreamError
from libs.rpc.channel import open_channel
from services.inference.backends.chat import ChunkSink
from services.inference.backends.stall import StallGuard, StallLimits
from services.inference.domain import (
    BackendFailedError,
    ChatCall,
    Chunk,
    Delivered,
    Finish,
)

_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_INFER = "/inference.GRPCInferenceService/ModelInfer"

_LENGTH = struct.Struct("<I")

# Reasons that a model itself gives, and the status that each stands for.
_MODEL_REASONS = {"PROMPT_TOO_LONG": "INVALID_ARGUMENT", "INVALID_FIELD": "INVALID_ARGUMENT"}
_FIELD_OF_REASON = {"PROMPT_TOO_LONG": "messages"}


class Triton:
    """One Triton.

    Attributes:
        channel: for what is not streamed.
        stall_limits: how long it may be silent.
    """

    def __init__(self, address: str, *, stall: StallLimits) -> None:
        # Untraced and without gRPC's retries: attempts are ours, with spans of their own.
        self.channel = open_channel(address, traced=False, retries=False)
        self._raw = ServerStreamClient(address)
        self.stall_limits = stall
        self._infer = self.channel.unary_unary(
            _INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    async def generate(
        self,
        backend_model: str,
        call: ChatCall,
        *,
        max_tokens: int,
        delivered: Delivered,
        relay: ChunkSink,
    ) -> Finish:
        """Puts the pieces of an answer into the relay, from where it stopped.

        Raises:
            BackendFailedError: the backend died or lost the model.
            HeadraceError: the model refuses the request.
        """
        request = _chat_request(backend_model, call, max_tokens=max_tokens, delivered=delivered)
        with StallGuard(self.stall_limits) as guard:
            async with self.stream(request) as stream:
                while messages := await stream.read():
                    for message in messages:
                        piece = _piece(message)
                        delivered.add(piece)
                        relay.put(piece)
                        if piece.finish is not None:
                            return piece.finish
                        if relay.full:
                            guard.wait()
                            await relay.room()
                    guard.progress()
        # Without an ending every end is a failure, also one with status OK.
        raise BackendFailedError("the stream ended without an ending")

    @asynccontextmanager
    async def stream(self, request: bytes) -> AsyncIterator[ServerStreamCall]:
        """Calls `ModelStreamInfer` with one request, for as long as a block runs.

        Raises:
            BackendFailedError: no Triton listens, or it ended the stream with an error.
        """
        try:
            call = await self._raw.call(_STREAM, request, trace_metadata())
            with closing(call):
                yield call
        except ServerStreamError as error:
            raise BackendFailedError(str(error)) from error

    async def embed(self, backend_model: str, texts: Sequence[str]) -> list[tuple[bytes, int]]:
        """Returns for each text its vector, as little-endian float32, and its count of tokens.

        Raises:
            BackendFailedError: the backend died or lost the model.
            HeadraceError: the model refuses the request.
        """
        request = service_pb2.ModelInferRequest(
            model_name=backend_model,
            inputs=[_tensor("text", "BYTES", [len(texts), 1])],
            raw_input_contents=[b"".join(_bytes_element(text.encode()) for text in texts)],
        )
        try:
            response = await self._infer(
                request,
                metadata=trace_metadata(),
                timeout=self.stall_limits.first_token_seconds,
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error.details() or "") from error
        outputs = _outputs(response)
        vectors, counts = outputs["embedding"], outputs["token_count"]
        size = len(vectors) // len(texts)
        return [
            (vectors[index * size : (index + 1) * size], count)
            for index, (count,) in enumerate(struct.iter_unpack("<i", counts))
        ]

    async def close(self) -> None:
        """Closes all connections."""
        await self._raw.close()
        await self.channel.close(None)


def _chat_request(
    backend_model: str, call: ChatCall, *, max_tokens: int, delivered: Delivered
) -> bytes:
    asked = call.request
    body = {
        "messages": _messages(asked.messages),
        "max_tokens": max_tokens,  # of the whole answer
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "stop": list(asked.stop),
        "resume": {"pieces": delivered.segments} if delivered.segments else None,
    }
    return _json_request(backend_model, body, request_id=call.request_id)


def count_request(backend_model: str, messages: Sequence[Message]) -> bytes:
    """Returns the request to count the tokens of a conversation."""
    body = {"operation": "count_tokens", "messages": _messages(messages)}
    return _json_request(backend_model, body)


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in messages]


def _json_request(backend_model: str, body: object, *, request_id: str = "") -> bytes:
    request = service_pb2.ModelInferRequest(
        model_name=backend_model,
        id=request_id,
        inputs=[_tensor("request", "BYTES", [1])],
        raw_input_contents=[_bytes_element(json.dumps(body).encode())],
    )
    serialised: bytes = request.SerializeToString()
    return serialised


def _piece(message: bytes) -> Chunk:
    response = service_pb2.ModelStreamInferResponse.FromString(message)
    if response.error_message:
        raise error_of(response.error_message)
    outputs = _outputs(response.infer_response)
    if not outputs:  # Triton's own empty final response
        return Chunk("")
    ids = outputs["token_ids"]
    token_ids = struct.unpack(f"<{len(ids) // 4}i", ids)
    ending = outputs["final"][_LENGTH.size :]
    return Chunk(
        text=outputs["text"][_LENGTH.size :].decode(),
        token_ids=tuple(token for token in token_ids if token >= 0),
        token_count=len(token_ids),
        finish=Finish(**json.loads(ending)) if ending else None,
    )


def _outputs(response: Any) -> Mapping[str, bytes]:
    return {
        output.name: raw
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def error_of(message: str) -> HeadraceError | BackendFailedError:
    """Reads an error of Triton's: models give JSON, all else is the backend's fault."""
    start = message.find("{")
    try:
        told = json.loads(message[start:]) if start >= 0 else {}
    except ValueError:
        told = {}
    reason = told.get("reason", "")
    if reason not in _MODEL_REASONS:
        return BackendFailedError(message)
    text = told.get("message", reason)
    metadata = {str(key): str(value) for key, value in told.get("metadata", {}).items()}
    field = metadata.get("field", _FIELD_OF_REASON.get(reason, ""))
    return BY_CODE[_MODEL_REASONS[reason]](
        text, reason=reason, metadata=metadata, field_violations=[(field, text)]
    )


def _tensor(name: str, datatype: str, shape: list[int]) -> Any:
    return service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


def _bytes_element(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the metadata that carries the trace on."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())
