"""How long the texts in tensors are, and what a conversation in them says."""

from __future__ import annotations

import json
import struct
import time

import pytest
from tritonclient.grpc import service_pb2

from libs.chat.request import Message
from libs.errors import InvalidArgument
from services.inference.tensors.texts import (
    check_text_sizes,
    conversation_of,
    longest_element_bytes,
)


@pytest.mark.parametrize("raw", [True, False])
def test_the_longest_text_is_found_without_decoding_any(raw):
    """In raw contents and in typed ones, in any tensor; small messages are not searched."""
    texts = [b"a" * 10, b"", b"b" * 3000, b"c" * 20]
    packed = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES")
    if not raw:
        tensor.contents.bytes_contents.extend(texts)
    message = service_pb2.ModelInferRequest(
        model_name="m",
        inputs=[service_pb2.ModelInferRequest.InferInputTensor(name="other"), tensor],
        raw_input_contents=[bytes(8), packed] if raw else [],
    ).SerializeToString()
    assert longest_element_bytes(message, enough=1000) == 3000
    assert longest_element_bytes(message, enough=10_000) == 0


def test_a_length_beyond_the_message_is_a_long_text():
    """Triton refuses it later; here it must not be taken for a short one, nor fail."""
    message = service_pb2.ModelInferRequest(
        model_name="m", raw_input_contents=[b"\xff\xff\xff\xff" + bytes(2000)]
    ).SerializeToString()
    assert longest_element_bytes(message, enough=1000) > 1000


def test_millions_of_elements_are_refused_after_a_few():
    """Raw ones and typed ones: a model would make an object of each."""
    raw = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[bytes(8_000_000)])
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="text")
    tensor.contents.bytes_contents.extend([b""] * 100_000)
    typed = service_pb2.ModelInferRequest(model_name="m", inputs=[tensor])
    for message in (raw.SerializeToString(), typed.SerializeToString()):
        started = time.perf_counter()
        with pytest.raises(InvalidArgument):
            longest_element_bytes(message, enough=1000)
        assert time.perf_counter() - started < 0.1


def test_a_text_that_cannot_fit_is_refused():
    """Where the model's limit is known."""
    message = service_pb2.ModelInferRequest(
        model_name="m", raw_input_contents=[struct.pack("<I", 2000) + bytes(2000)]
    ).SerializeToString()
    check_text_sizes(message, 0)
    check_text_sizes(message, 2000)
    with pytest.raises(InvalidArgument) as caught:
        check_text_sizes(message, 1999)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata["limit_bytes"] == "1999"


def test_a_conversation_is_read_where_it_can_be():
    """To count its tokens: anything else has none."""

    def read(body: object) -> tuple[Message, ...] | None:
        text = json.dumps(body).encode()
        message = service_pb2.ModelInferRequest(
            model_name="m", raw_input_contents=[struct.pack("<I", len(text)) + text]
        )
        request = conversation_of(message.SerializeToString(), model="m")
        return request.messages if request is not None else None

    assert read({"messages": [{"role": "user", "content": "hi"}]}) == (Message("user", "hi"),)
    for wrong in ("{}", "[]", '{"messages": [1]}', '{"messages": 7}', '{"messages": [{}]}'):
        assert read(json.loads(wrong)) is None
    assert conversation_of(b"", model="m") is None
