"""Triton as a backend: its tensors, its errors, and the tokens of a stream."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.errors import InvalidArgument
from services.inference.backends.stall import StallLimits
from services.inference.backends.triton import codec
from services.inference.backends.triton.client import Triton
from services.inference.backends.triton.errors import triton_error
from services.inference.domain import BackendFailedError, ChatCall, Chunk, Delivered, Finish
from services.inference.generation.relay import Collector
from tests.support.triton import TEXT, TOKENS, MockTriton, mock_triton

CALL = ChatCall(
    request_id="r", request=GenerationRequest(model="m", messages=(Message("user", "hello"),))
)
STALL = StallLimits(first_token_seconds=2.0, between_tokens_seconds=2.0)
FINAL = {"finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 4, "cached_tokens": 1}


def response(text: bytes = b"a", ids: tuple[int, ...] = (1,), final: Any = None, **more: bytes):
    end = json.dumps(final).encode() if final is not None else b""
    outputs = {
        "text": struct.pack("<I", len(text)) + text,
        "token_ids": struct.pack(f"<{len(ids)}i", *ids),
        "final": struct.pack("<I", len(end)) + end,
        **more,
    }
    return service_pb2.ModelInferResponse(
        outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs],
        raw_output_contents=list(outputs.values()),
    )


def streamed(answer: Any) -> bytes:
    message: bytes = service_pb2.ModelStreamInferResponse(infer_response=answer).SerializeToString()
    return message


def test_a_chunk_has_text_ids_and_its_number_of_tokens():
    """Ids that the engine does not report are left out, and counted."""
    assert codec.read_chunk(streamed(response(b"ab", (1, 2)))) == Chunk("ab", (1, 2), 2)
    assert codec.read_chunk(streamed(response(b"\xc3\xa9", (-1, 7)))) == Chunk("é", (7,), 2)
    assert codec.read_chunk(streamed(service_pb2.ModelInferResponse())) == Chunk("")


def test_fields_and_outputs_that_a_model_adds_are_skipped():
    """A newer model answers through an older service."""
    final = FINAL | {"draft_tokens": 3, "timings": {"ms": 1}, "completion_reason": None}
    chunk = codec.read_chunk(streamed(response(b"", (), final, logprobs=b"\x00" * 4)))
    assert chunk == Chunk("", (), 0, Finish("stop", 5, 4, 1))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"finish_reason": 3}, "finish_reason"),
        ({"finish_reason": ""}, "finish_reason"),
        ({"prompt_tokens": "5"}, "prompt_tokens"),
        ({"prompt_tokens": None}, "prompt_tokens"),
        ({"completion_tokens": -1}, "completion_tokens"),
        ({"completion_tokens": True}, "completion_tokens"),
        ({"cached_tokens": 1.5}, "cached_tokens"),
        ({"cached_tokens": 2**31}, "cached_tokens"),
    ],
)
def test_a_missing_or_wrong_field_at_the_end_is_named(wrong, named):
    """It is the backend's fault, and operators learn which field."""
    with pytest.raises(BackendFailedError, match=named):
        codec.read_chunk(streamed(response(final=FINAL | wrong)))
    without = {name: value for name, value in FINAL.items() if name not in wrong}
    with pytest.raises(BackendFailedError, match=named):
        codec.read_chunk(streamed(response(final=without)))


@pytest.mark.parametrize("final", [[], 3, "stop"])
def test_an_end_that_is_not_an_object_is_the_backends_fault(final):
    """Any other JSON."""
    with pytest.raises(BackendFailedError, match="not an object"):
        codec.read_chunk(streamed(response(final=final)))


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff",
        streamed(response(b"\xff")),
        streamed(response(token_ids=b"\x00" * 3)),
        streamed(service_pb2.ModelInferResponse(
            outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name="text")],
            raw_output_contents=[b"\x00\x00\x00\x00"],
        )),
        streamed(service_pb2.ModelInferResponse(
            outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name="text")]
        )),
    ],
    ids=["not a message", "not UTF-8", "half an id", "no token_ids", "no content"],
)  # fmt: skip
def test_a_malformed_chunk_is_the_backends_fault(message):
    """And no error of this service."""
    with pytest.raises(BackendFailedError, match="malformed"):
        codec.read_chunk(message)


@given(st.binary(max_size=80))
def test_no_bytes_cause_another_error(message):
    """Whatever a backend sends."""
    readers = (
        codec.read_chunk,
        codec.read_prompt_tokens,
        lambda data: codec.read_embeddings(data, texts=1),
        codec.read_final,
    )
    for read in readers:
        with suppress(BackendFailedError):
            read(message)


def test_embeddings_come_one_per_text():
    """Each with its number of tokens."""
    vectors, counts = struct.pack("<4f", 1, 2, 3, 4), struct.pack("<2i", 7, 8)
    answer = response(embedding=vectors, token_count=counts).SerializeToString()
    assert codec.read_embeddings(answer, texts=2) == [(vectors[:8], 7), (vectors[8:], 8)]


@pytest.mark.parametrize(
    "outputs",
    [
        {"embedding": bytes(16)},
        {"token_count": bytes(8)},
        {"embedding": bytes(16), "token_count": bytes(4)},
        {"embedding": bytes(12), "token_count": bytes(8)},
        {"embedding": b"", "token_count": bytes(8)},
        {"embedding": bytes(16), "token_count": struct.pack("<2i", 1, -1)},
    ],
)
def test_embeddings_that_do_not_fit_the_texts_are_the_backends_fault(outputs):
    """Vectors must not be assigned to the wrong texts."""
    with pytest.raises(BackendFailedError, match="malformed"):
        codec.read_embeddings(response(**outputs).SerializeToString(), texts=2)


@pytest.mark.parametrize(
    "message",
    [
        "out of memory",
        "{",
        '{"reason": "INTERNAL"}',
        '{"reason": ["PROMPT_TOO_LONG"]}',
        '{"reason": null, "message": 3}',
        '{"reason": "PROMPT_TOO_LONG"',
        '{"a":' * 100_000,
    ],
)
def test_any_other_error_of_a_model_is_no_refusal(message):
    """Whatever it looks like: another backend may answer."""
    assert isinstance(triton_error(message), BackendFailedError)


@pytest.mark.parametrize("metadata", [None, [], "x", {"field": None, "new": {"a": 1}}])
def test_a_models_refusal_is_read_whatever_else_it_has(metadata):
    """The reason decides; other fields are skipped."""
    body = {"reason": "INVALID_FIELD", "message": "too hot", "metadata": metadata, "new": 1}
    error = triton_error("[request id: r] " + json.dumps(body), request_id="r")
    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.message) == ("INVALID_FIELD", "too hot")


async def generate(mock: MockTriton, delivered: Delivered) -> tuple[Finish, list[Chunk]]:
    triton = Triton(mock.address, stall=STALL, clock=SystemClock())
    collector = Collector(on_first=lambda: None)
    try:
        finish = await triton.generate(
            "m", CALL, max_tokens=9, delivered=delivered, relay=collector
        )
    finally:
        await triton.close()
    return finish, collector.chunks


async def test_a_model_with_new_fields_answers():
    """From the request to the end of the answer."""
    async with mock_triton(final={"draft_tokens": 7}) as mock:
        finish, chunks = await generate(mock, Delivered())
    assert finish == Finish("stop", 5, 4, 0)
    assert "".join(chunk.text for chunk in chunks) == TEXT


async def test_tokens_without_text_and_id_are_delivered_with_the_next_text():
    """Every token is counted, in a chunk after which an engine can continue."""
    async with mock_triton(hidden=2) as mock:
        delivered = Delivered()
        _, chunks = await generate(mock, delivered)
    assert [chunk.token_count for chunk in chunks] == [3] * len(TOKENS) + [0]
    assert delivered.segments == list(TOKENS.values())
    assert delivered.token_count == 3 * len(TOKENS)


async def test_tokens_that_an_engine_generates_again_are_counted_once():
    """The first backend dies between two tokens without text and the text that follows."""
    delivered = Delivered()
    async with mock_triton(hidden=2, dies_after=1) as bad, mock_triton(hidden=2) as good:
        with pytest.raises(BackendFailedError):
            await generate(bad, delivered)
        assert delivered.token_count == 3
        await generate(good, delivered)
    assert good.requests[0]["resume"] == {"pieces": ["one "]}
    assert delivered.token_count == 3 * len(TOKENS)


async def test_the_tokens_of_a_conversation_are_counted_by_the_model():
    """The number is in the last message."""
    async with mock_triton() as mock:
        triton = Triton(mock.address, stall=STALL, clock=SystemClock())
        try:
            messages = CALL.request.messages
            count = await triton.count_tokens("m", messages, deadline_seconds=None)
        finally:
            await triton.close()
    assert count == 5
    assert mock.requests[0]["operation"] == "count_tokens"
