"""Messages renamed by appended bytes, compared with what protobuf reads."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from libs.errors import InvalidArgument
from services.inference.domain import BackendFailedError
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
def test_only_the_model_of_a_request_changes(request, name, more):
    """Whatever it carries, protobuf reads the new name, no version and the same tensors."""
    message = request.SerializeToString()
    head = codec.read_request(message)
    assert head[:5] == (
        request.model_name,
        request.model_version,
        request.id,
        frozenset({"p"}),
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
def test_only_the_model_of_a_response_changes(response, name, version):
    """In unary calls and in streams."""
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
def test_protobuf_reads_the_new_name_of_every_accepted_message(message):
    """No malformed message can keep its own name by swallowing the appended bytes."""
    try:
        codec.read_request(message)
    except InvalidArgument:
        return
    try:
        read = service_pb2.ModelInferRequest.FromString(codec.renamed_request(message, "new"))
    except DecodeError:
        return  # Triton cannot read it either
    assert (read.model_name, read.model_version) == ("new", "")


def test_a_message_with_too_many_fields_is_refused():
    """The walk has a limit, whatever the limit of the message's size."""
    with pytest.raises(InvalidArgument, match="more than 4096 fields"):
        codec.read_request(b"\x3a\x00" * (codec.MAX_FIELDS + 1))


def test_outputs_requested_with_parameters_are_found():
    """As classes, for example, from which no tokens could be read."""
    request = service_pb2.ModelInferRequest()
    request.outputs.add(name="token_count").parameters["classification"].int64_param = 1
    request.outputs.add(name="embedding")
    head = codec.read_request(request.SerializeToString())
    assert head.outputs == ("token_count", "embedding")
    assert head.altered_outputs == {"token_count"}


def test_the_names_of_parameters_are_found():
    """Those of the whole request only; the last name of an entry counts, as in protobuf."""
    request = service_pb2.ModelInferRequest()
    request.parameters["priority"].int64_param = 1
    request.inputs.add(name="x").parameters["inner"].bool_param = True
    message = request.SerializeToString() + b"\x22\x08\x0a\x01a\x0a\x03abc"
    assert codec.read_request(message).parameters == {"priority", "abc"}
    with pytest.raises(InvalidArgument, match="more than 32 fields"):
        codec.read_request(b"\x22\x42" + b"\x0a\x00" * 33)


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size"])
@pytest.mark.parametrize("tensors", ["inputs", "outputs"])
def test_tensors_are_never_in_shared_memory(tensors, name):
    """Triton would read or write memory of its machine that a caller names."""
    request = service_pb2.ModelInferRequest(model_name="m")
    getattr(request, tensors).add(name="x").parameters["binary"].bool_param = True
    getattr(request, tensors).add(name="y").parameters[name].string_param = "region"
    with pytest.raises(InvalidArgument, match=f"the parameter {name} is not allowed"):
        codec.read_request(request.SerializeToString())


def test_texts_about_shared_memory_are_tensors_like_others():
    """Only parameters are refused, and the search for them is bounded."""
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x").contents.bytes_contents.append(b"shared_memory_region")
    assert codec.read_request(request.SerializeToString()).model_name == "m"
    for _ in range(64):
        request.inputs.add(name="x").contents.bytes_contents.append(b"shared_memory_region")
    with pytest.raises(InvalidArgument, match="more than 64 tensors"):
        codec.read_request(request.SerializeToString())


def test_tokens_of_an_embedding_model_are_summed():
    """One number per text, wherever the output is."""
    response = _response(embedding=bytes(8), token_count=struct.pack("<3i", 4, 5, 300))
    tokens = codec.read_response(response.SerializeToString())
    assert tokens == codec.InferResponseTokens(input_tokens=309, has_outputs=True)


def test_tokens_and_the_end_of_a_chat_model_are_read():
    """Also in a streamed message; the empty message after the last one has neither."""
    final = json.dumps({"prompt_tokens": 7}).encode()
    response = _response(
        text=b"\x00\x00\x00\x00",
        token_ids=struct.pack("<2i", 1, 2),
        final=struct.pack("<I", len(final)) + final,
    )
    streamed = service_pb2.ModelStreamInferResponse(infer_response=response)
    read = codec.read_streamed(streamed.SerializeToString())
    tokens = codec.InferResponseTokens(final=final, generated_tokens=2, has_outputs=True)
    assert read == codec.StreamedResponse("", tokens)
    empty = service_pb2.ModelStreamInferResponse(infer_response={"id": "r"})
    assert codec.read_streamed(empty.SerializeToString()) == codec.StreamedResponse(
        "", codec.InferResponseTokens()
    )


@given(TEXTS, TEXTS)
def test_an_error_in_a_stream_names_its_request(text, request_id):
    """As in Triton's own responses."""
    response = service_pb2.ModelStreamInferResponse.FromString(
        codec.streamed_error(text, request_id)
    )
    assert (response.error_message, response.infer_response.id) == (text, request_id)
    if text:
        assert codec.read_streamed(response.SerializeToString()).error_message == text


@given(st.binary(max_size=60) | RESPONSES.map(lambda r: r.SerializeToString()[:-1]))
def test_a_malformed_response_is_the_backends_fault(message):
    """Of a backend nothing is certain: no other error escapes."""
    for read in (codec.read_response, codec.read_streamed):
        with suppress(BackendFailedError):
            read(message)


@pytest.mark.parametrize("counts", [struct.pack("<i", -1), struct.pack("<2i", 5, -3)])
def test_negative_numbers_of_tokens_are_the_backends_fault(counts):
    """They would be credited to the tenant."""
    response = _response(embedding=bytes(4), token_count=counts).SerializeToString()
    with pytest.raises(BackendFailedError, match="negative"):
        codec.read_response(response)


def _response(**outputs: bytes):
    return service_pb2.ModelInferResponse(
        outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs],
        raw_output_contents=list(outputs.values()),
    )
