"""What it takes to read one message: nested fields must not multiply."""

from __future__ import annotations

import struct
import time

import pytest
from headrace.common.v1.model_pb2 import MODEL_KIND_EMBEDDING
from tritonclient.grpc import service_pb2

from libs.embedding_texts import MAX_TEXTS
from libs.errors import InvalidArgument
from services.inference.tensors import codec
from services.inference.tensors.inputs import check_encoding
from services.inference.tensors.texts import check_text_sizes

SIZE_BYTES = 8 * 2**20
# An empty field of the contents of a tensor takes two bytes.
EMPTY_FIELDS = codec.MAX_FIELDS - 1


def field(number: int, value: bytes) -> bytes:
    key = codec.encode_varint(number << 3 | 2)
    return key + codec.encode_varint(len(value)) + value


def filled(part: bytes, most: int) -> bytes:
    """Returns as many of a part as a message of 8 MiB may have."""
    return part * min(most, SIZE_BYTES // len(part))


def nested(contents: bytes) -> bytes:
    """Returns inputs with contents that each take long."""
    return filled(field(5, filled(field(5, contents), 60)), 500)


NAMES = field(1, b"") * EMPTY_FIELDS
LONG_VARINTS = (b"\x88" + b"\x80" * 3 + b"\x00" + b"\x80" * 9 + b"\x00") * EMPTY_FIELDS
WORST = {
    "raw": filled(field(7, bytes(4 * EMPTY_FIELDS)), 500),
    "texts": nested(field(8, b"") * EMPTY_FIELDS),
    "no texts": nested(field(1, b"") * EMPTY_FIELDS),
    "input": field(5, field(1, b"text") + field(2, b"BYTES") + filled(field(5, NAMES), 60)),
    "parameters": filled(field(5, field(1, b"shared_memory_") + field(4, NAMES) * 60), 64),
    "outputs": filled(field(6, field(1, b"shared_memory_") + field(2, NAMES) * 30), 64),
    "names": filled(field(4, field(1, b"") * 32), EMPTY_FIELDS),
    "varints": filled(field(5, field(5, LONG_VARINTS) * 60), 400),
}


def check(message: bytes) -> None:
    """Reads a message as it is before it is admitted."""
    budget = codec.Budget()
    codec.read_request(message, budget)
    check_text_sizes(message, 1000, budget)
    check_encoding(message, MODEL_KIND_EMBEDDING, budget)


@pytest.mark.parametrize("kind", WORST)
def test_the_worst_messages_are_refused_at_once(kind):
    """Others wait while one is read. 1,000 bytes more make it large enough to be searched."""
    message = WORST[kind] + field(3, bytes(1000))
    assert len(message) <= SIZE_BYTES + 2**20
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with pytest.raises(InvalidArgument) as caught:
            check(message)
        seconds.append(time.perf_counter() - started)
        assert caught.value.reason == "INVALID_FIELD"
    assert min(seconds) < 0.3  # 0.1 where nothing else runs


@pytest.mark.parametrize("as_raw", [True, False])
def test_a_request_with_the_most_texts_is_read(as_raw):
    """With as many outputs as it may ask for, and tensors of other types of any size."""
    texts = [b"a text"] * MAX_TEXTS
    text = service_pb2.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[1])
    if not as_raw:
        text.contents.bytes_contents.extend(texts)
    request = service_pb2.ModelInferRequest(model_name="m", id="1", inputs=[text])
    request.inputs.add(name="values", datatype="FP32").contents.fp32_contents.extend([0.5] * 99_999)
    for number in range(codec.MAX_OUTPUTS):
        request.outputs.add(name=f"output {number}")
    if as_raw:
        packed = b"".join(struct.pack("<I", len(each)) + each for each in texts)
        request.raw_input_contents.extend([packed, b"\xff" * SIZE_BYTES])
    budget = codec.Budget()
    message = request.SerializeToString()
    assert len(codec.read_request(message, budget).outputs) == codec.MAX_OUTPUTS
    check_text_sizes(message, 2**32, budget)
    check_encoding(message, MODEL_KIND_EMBEDDING, budget)
    assert budget.steps > codec.MAX_STEPS // 2


def test_an_answer_of_a_backend_has_the_same_budget():
    """A backend that fails must not block the requests to the others."""
    message = filled(field(5, NAMES), 500)
    with pytest.raises(Exception, match="more than 32768 fields"):
        codec.read_response(message)


def test_the_id_of_a_message_is_found_whatever_else_it_has():
    """An error of a stream has it; reading it takes no nested fields."""
    assert codec.request_id_of(WORST["parameters"] + field(3, b"abc")) == "abc"
    assert codec.request_id_of(b"\xff") == ""
