"""Messages renamed by appended bytes, held against protobuf's own reading of them."""

from __future__ import annotations

import json
import struct

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from libs.errors import InvalidArgument
from services.inference.tensors import codec

TEXTS = st.text(max_size=20)
TENSORS = st.lists(st.tuples(TEXTS, st.binary(max_size=300)), max_size=4)
REQUESTS = st.builds(
    lambda name, version, request_id, tensors, outputs, number: service_pb2.ModelInferRequest(
        model_name=name,
        model_version=version,
        id=request_id,
        parameters={"p": service_pb2.InferParameter(int64_param=number)},
        inputs=[
            service_pb2.ModelInferRequest.InferInputTensor(
                name=tensor, datatype="BYTES", shape=[number, 1]
            )
            for tensor, _ in tensors
        ],
        outputs=[
            service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=output)
            for output in outputs
        ],
        raw_input_contents=[raw for _, raw in tensors],
    ),
    TEXTS, TEXTS, TEXTS, TENSORS, st.lists(TEXTS, max_size=3), st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
RESPONSES = st.builds(
    lambda name, version, request_id, tensors: service_pb2.ModelInferResponse(
        model_name=name,
        model_version=version,
        id=request_id,
        outputs=[
            service_pb2.ModelInferResponse.InferOutputTensor(name=tensor) for tensor, _ in tensors
        ],
        raw_output_contents=[raw for _, raw in tensors],
    ),
    TEXTS, TEXTS, TEXTS, TENSORS,
)  # fmt: skip


@given(REQUESTS, TEXTS, st.lists(TEXTS, max_size=2))
def test_a_request_is_renamed_and_nothing_else_of_it_changes(request, name, more):
    """Whatever it carries, protobuf reads the new name, no version and the same tensors."""
    message = request.SerializeToString()
    asked = codec.read_request(message)
    assert asked[:4] == (
        request.model_name,
        request.model_version,
        request.id,
        tuple(output.name for output in request.outputs),
    )
    renamed = service_pb2.ModelInferRequest.FromString(
        codec.renamed_request(message, name, more_outputs=more)
    )
    request.model_name, request.model_version = name, ""
    for output in more:
        request.outputs.add(name=output)
    assert renamed == request


@given(RESPONSES, TEXTS, TEXTS)
def test_answers_are_renamed_and_nothing_else_of_them_changes(response, name, version):
    """Of unary calls and inside streams alike."""
    message = response.SerializeToString()
    streamed = service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()
    response.model_name, response.model_version = name, version
    renamed = codec.renamed_response(message, name, version)
    assert service_pb2.ModelInferResponse.FromString(renamed) == response
    merged = service_pb2.ModelStreamInferResponse.FromString(
        codec.renamed_streamed(streamed, name, version)
    )
    assert merged == service_pb2.ModelStreamInferResponse(infer_response=response)


@given(st.binary(max_size=60) | REQUESTS.map(lambda r: r.SerializeToString()[:-1]))
def test_what_is_accepted_is_renamed_for_protobuf_too(message):
    """No broken message can keep its own name by swallowing the bytes behind it."""
    try:
        codec.read_request(message)
    except InvalidArgument:
        return
    try:
        read = service_pb2.ModelInferRequest.FromString(codec.renamed_request(message, "new"))
    except DecodeError:
        return  # Triton will not read it either
    assert (read.model_name, read.model_version) == ("new", "")


def test_a_message_of_endless_fields_is_refused():
    """The walk has a limit, whatever the message's size allows."""
    with pytest.raises(InvalidArgument, match="more than 4096 fields"):
        codec.read_request(b"\x3a\x00" * (codec.MAX_FIELDS + 1))


def test_outputs_that_shall_not_come_as_they_are_are_found():
    """As classes, say, from which no tokens could be read."""
    request = service_pb2.ModelInferRequest()
    request.outputs.add(name="token_count").parameters["classification"].int64_param = 1
    request.outputs.add(name="embedding")
    asked = codec.read_request(request.SerializeToString())
    assert asked.outputs == ("token_count", "embedding")
    assert asked.altered_outputs == {"token_count"}


def test_tokens_of_an_embedding_model_are_summed():
    """One count a text, wherever the output stands."""
    response = _response(embedding=bytes(8), token_count=struct.pack("<3i", 4, 5, 300))
    answered = codec.read_response(response.SerializeToString())
    assert answered == codec.InferResponseTokens(input_tokens=309, has_outputs=True)


def test_tokens_and_the_end_of_a_chat_model_are_read():
    """Also inside a streamed message; the empty message behind the last has neither."""
    final = json.dumps({"prompt_tokens": 7}).encode()
    response = _response(
        text=b"\x00\x00\x00\x00",
        token_ids=struct.pack("<2i", 1, 2),
        final=struct.pack("<I", len(final)) + final,
    )
    streamed = service_pb2.ModelStreamInferResponse(infer_response=response)
    read = codec.read_streamed(streamed.SerializeToString())
    answered = codec.InferResponseTokens(final=final, generated_tokens=2, has_outputs=True)
    assert read == codec.StreamedResponse("", answered)
    empty = service_pb2.ModelStreamInferResponse(infer_response={"id": "r"})
    assert codec.read_streamed(empty.SerializeToString()) == codec.StreamedResponse(
        "", codec.InferResponseTokens()
    )


@given(TEXTS, TEXTS)
def test_an_error_in_a_stream_names_its_request(text, request_id):
    """As Triton tells it."""
    told = service_pb2.ModelStreamInferResponse.FromString(codec.streamed_error(text, request_id))
    assert (told.error_message, told.infer_response.id) == (text, request_id)
    if text:
        assert codec.read_streamed(told.SerializeToString()).error_message == text


def _response(**outputs: bytes):
    return service_pb2.ModelInferResponse(
        outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs],
        raw_output_contents=list(outputs.values()),
    )
