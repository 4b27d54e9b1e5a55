"""Texts in tensors are checked before a model sees them."""

from __future__ import annotations

from typing import Any

import pytest
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, MODEL_KIND_EMBEDDING
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from libs.embedding_texts import MAX_TEXTS
from libs.errors import InvalidArgument
from services.inference.backends.triton.codec import LENGTH
from services.inference.tensors.inputs import check_encoding

SURROGATE = "a\ud800".encode("utf-8", "surrogatepass")
Input = service_pb2.ModelInferRequest.InferInputTensor


def tensor(name: str = "text", datatype: str = "BYTES", **more: Any) -> Any:
    return Input(name=name, datatype=datatype, shape=[1, 1], **more)


def raw(*elements: bytes) -> bytes:
    return b"".join(LENGTH.pack(len(element)) + element for element in elements)


def message(*inputs: Any, contents: tuple[bytes, ...] = ()) -> bytes:
    made = service_pb2.ModelInferRequest(inputs=inputs, raw_input_contents=contents)
    return bytes(made.SerializeToString())


def test_texts_pass():
    """Raw or as fields, of any script; other inputs may have any bytes."""
    check_encoding(message(tensor(), contents=(raw("é🌊".encode(), b""),)), MODEL_KIND_EMBEDDING)
    fields = tensor(contents={"bytes_contents": ["é".encode()]})
    check_encoding(message(fields), MODEL_KIND_EMBEDDING)
    image, text = tensor("image"), tensor()
    contents = (b"\xff\xfe", raw(b"a cat"))
    check_encoding(message(image, text, contents=contents), MODEL_KIND_EMBEDDING)
    check_encoding(message(tensor(datatype="FP32"), contents=(b"\xff",)), MODEL_KIND_EMBEDDING)


@pytest.mark.parametrize(
    ("kind", "name"), [(MODEL_KIND_EMBEDDING, "text"), (MODEL_KIND_CHAT, "request")]
)
@pytest.mark.parametrize("wrong", [b"a\xff", SURROGATE, b"\xc3"])
def test_bytes_that_are_no_text_are_refused(kind, name, wrong):
    """The element is named, its contents are not quoted."""
    as_raw = message(tensor(name), contents=(raw(b"good", wrong),))
    as_field = message(tensor(name, contents={"bytes_contents": [b"good", wrong]}))
    for made in (as_raw, as_field):
        with pytest.raises(InvalidArgument, match="must be UTF-8") as caught:
            check_encoding(made, kind)
        assert caught.value.field_violations[0][0] == f"{name}[1]"


def test_contents_that_protobuf_merges_are_all_checked():
    """A field that occurs twice is one field for Triton."""
    two = b"".join(
        tensor(contents={"bytes_contents": [value]}).SerializeToString() for value in (b"\xff", b"")
    )
    made = b"\x2a" + bytes([len(two)]) + two
    assert (
        len(service_pb2.ModelInferRequest.FromString(made).inputs[0].contents.bytes_contents) == 2
    )
    with pytest.raises(InvalidArgument, match="UTF-8"):
        check_encoding(made, MODEL_KIND_EMBEDDING)


@pytest.mark.parametrize("contents", [b"\x05\x00\x00\x00abc", b"\x05", raw(b"a") + b"\x01\x00"])
def test_elements_that_end_early_are_refused(contents):
    """Before Triton reads beyond them."""
    with pytest.raises(InvalidArgument, match="ends inside"):
        check_encoding(message(tensor(), contents=(contents,)), MODEL_KIND_EMBEDDING)


def test_there_is_a_limit_to_the_number_of_texts():
    """Empty ones cost four bytes each; reading millions of them would block all others."""
    contents = raw(*[b""] * (MAX_TEXTS + 1))
    with pytest.raises(InvalidArgument, match=str(MAX_TEXTS)):
        check_encoding(message(tensor(), contents=(contents,)), MODEL_KIND_EMBEDDING)


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor(), tensor()],
        [tensor("other")] * 513,
        [tensor(parameters={str(n): {"bool_param": True} for n in range(64)})],
    ],
)
def test_messages_that_would_take_long_to_read_are_refused(inputs):
    """The walk would multiply."""
    with pytest.raises(InvalidArgument, match="not a valid ModelInferRequest"):
        check_encoding(message(*inputs), MODEL_KIND_EMBEDDING)


@given(st.binary(max_size=100))
def test_no_bytes_cause_another_error(made):
    """Whatever arrives."""
    try:
        check_encoding(made, MODEL_KIND_EMBEDDING)
        check_encoding(b"\x2a" + bytes([len(made)]) + made, MODEL_KIND_CHAT)
    except InvalidArgument:
        pass
