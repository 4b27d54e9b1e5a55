"""The rules of a generation request, and that every service applies the same ones."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from headrace.inference.v1 import inference_pb2
from headrace.inference.v1.inference_pb2 import GenerateRequest, Message, Part
from headrace.jobs.v1.jobs_pb2 import JobPayload
from hypothesis import given
from hypothesis import strategies as st

from libs.chat.request import MAX_MESSAGES, GenerationRequest
from libs.chat.request import Message as PlainMessage
from libs.chat.resume import token_prefix
from libs.chat.wire import generation_request, text_message
from libs.clock import SystemClock
from libs.errors import InvalidArgument
from services.inference.api import convert
from services.jobs.payload import checked_payload

GOOD = GenerationRequest(model="smollm2", messages=(PlainMessage("user", "hello"),))
HELLO = text_message(inference_pb2.ROLE_USER, "hello")
IMAGE = Message(role=inference_pb2.ROLE_USER, parts=[Part(image=inference_pb2.Image(url="x"))])
TOKEN = token_prefix(GOOD.fingerprint(), "1.0.0") + "31"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"request_id": "7"}, "request_id"),
        ({"model": ""}, "model"),
        ({"messages": ()}, "messages"),
        ({"messages": (PlainMessage("user", "x"),) * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": (PlainMessage("robot", "x"),)}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("a",) * 5}, "stop"),
        ({"priority": 77}, "priority"),
        ({"priority": -1}, "priority"),
        ({"resume_from": "-3"}, "resume_from"),
        ({"resume_from": TOKEN, "top_p": 0.5}, "resume_from"),
        ({"resume_from": TOKEN, "temperature": 1.0}, "resume_from"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], wrong: str) -> None:
    """The violation has the path of the field."""
    assert [field for field, _ in replace(GOOD, **fields).violations()] == [wrong]


def test_a_valid_request_has_no_violations() -> None:
    """Also with every field set; a token does not depend on id, priority and length."""
    request = replace(
        GOOD, temperature=2.0, top_p=1.0, seed=0, stop=("a",) * 4, request_id=str(uuid.uuid4())
    )
    token = token_prefix(request.fingerprint(), "1.0.0") + "3"
    request = replace(request, max_tokens=1, priority=9, request_id="", resume_from=token)
    assert request.violations() == []
    assert request.resumed_tokens == 3


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.0}, "presence_penalty"),
        ({"logit_bias": {7: 1.0}}, "logit_bias"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [inference_pb2.Tool()]}, "tools"),
        ({"tool_choice": inference_pb2.ToolChoice(function="f")}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            {"response_format": {"json_object": inference_pb2.JsonObjectFormat()}},
            "response_format",
        ),
        (
            {"messages": [Message(role=inference_pb2.ROLE_TOOL, parts=HELLO.parts)]},
            "messages[0].role",
        ),
        (
            {"messages": [text_message(inference_pb2.ROLE_DEVELOPER, "x")]},
            "messages[0].role",
        ),
        (
            {
                "messages": [
                    HELLO,
                    Message(
                        role=inference_pb2.ROLE_USER,
                        parts=[Part(image=inference_pb2.Image(url="x"))],
                    ),
                ]
            },
            "messages[1].parts[0].image",
        ),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(fields: dict[str, Any], wrong: str) -> None:
    """It would change the answer: ignoring it would be a wrong answer."""
    request = GenerateRequest(**{"model": "smollm2", "messages": [HELLO], **fields})
    violations = dict(generation_request(request).violations())
    assert violations[wrong] == "is not supported yet by this version"


def test_every_field_of_a_request_is_read_or_refused() -> None:
    """A field that is added to the proto must not be ignored."""
    read = {
        "request_id", "model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop",
        "priority", "resume_from", "n", "response_format",
    }  # fmt: skip
    for field in GenerateRequest.DESCRIPTOR.fields:
        if field.name in read:
            continue
        request = GenerateRequest(model="smollm2", messages=[HELLO])
        if field.name == "logit_bias":
            request.logit_bias[1] = 1.0
        elif field.is_repeated:
            getattr(request, field.name).add()
        elif field.message_type:
            getattr(request, field.name).SetInParent()
        else:
            setattr(request, field.name, field.cpp_type == field.CPPTYPE_BOOL or 1)
        assert [name for name, _ in generation_request(request).violations()] == [field.name]


def test_neutral_values_are_accepted() -> None:
    """A client that always sends them gets the answer that it asks for."""
    text = inference_pb2.ResponseFormat(text=inference_pb2.TextFormat())
    request = GenerateRequest(model="smollm2", messages=[HELLO], n=1, response_format=text)
    assert generation_request(request).violations() == []


def test_text_parts_are_concatenated() -> None:
    """In their order, with nothing between them."""
    parts = [Part(text="Hel"), Part(text="lo"), Part(text="")]
    request = GenerateRequest(
        model="smollm2", messages=[Message(role=inference_pb2.ROLE_ASSISTANT, parts=parts)]
    )
    read = generation_request(request)
    assert read.messages == (PlainMessage("assistant", "Hello"),)
    assert read.violations() == []


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (Message(role=inference_pb2.ROLE_USER), "messages[0].parts"),
        (Message(role=inference_pb2.ROLE_USER, parts=[Part()]), "messages[0].parts[0]"),
        (Message(parts=HELLO.parts), "messages[0].role"),
    ],
)
def test_an_incomplete_message_is_refused(message: Message, wrong: str) -> None:
    """Without a role, a part, or a content."""
    request = GenerateRequest(model="smollm2", messages=[message])
    assert [field for field, _ in generation_request(request).violations()] == [wrong]


def mostly(valid: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> Any:
    """Draws valid values more often than wrong ones, so that some requests are valid."""
    return st.one_of(valid, valid, valid, wrong)


TEXT_PARTS = st.lists(st.builds(Part, text=st.text(max_size=5)), min_size=1, max_size=3)
REQUESTS = st.builds(
    GenerateRequest,
    request_id=mostly(st.just("") | st.uuids().map(str), st.text(max_size=8)),
    model=mostly(st.just("smollm2"), st.just("")),
    messages=mostly(
        st.lists(
            st.builds(Message, role=st.sampled_from([1, 3, 4]), parts=TEXT_PARTS),
            min_size=1,
            max_size=3,
        ),
        st.lists(
            st.builds(
                Message, role=st.integers(0, 9), parts=TEXT_PARTS | st.just([]) | st.just([Part()])
            ),
            max_size=2,
        ),
    ),
    max_tokens=mostly(st.none() | st.integers(1, 4096), st.integers(-2, 0)),
    temperature=mostly(st.none() | st.floats(0, 2), st.floats()),
    top_p=mostly(st.none() | st.floats(0.01, 1), st.floats()),
    seed=mostly(st.none() | st.integers(0, 2**62), st.integers(-9, -1)),
    stop=mostly(
        st.lists(st.text(min_size=1, max_size=9), max_size=4),
        st.lists(st.text(max_size=90), max_size=6),
    ),
    priority=mostly(st.integers(0, 9), st.integers(-99, 99)),
    resume_from=mostly(st.just(""), st.just(TOKEN) | st.text(max_size=30)),
    n=mostly(st.none() | st.just(1), st.integers(-2, 9)),
    frequency_penalty=mostly(st.none(), st.floats()),
    tools=mostly(st.just([]), st.just([inference_pb2.Tool()])),
)


def wrong_fields_in_a_call(request: GenerateRequest) -> list[tuple[str, str]]:
    """Returns what the inference service refuses."""
    try:
        convert.chat_call(request, SystemClock()).check()
    except InvalidArgument as error:
        return list(error.field_violations)
    return []


def wrong_fields_in_a_job(request: GenerateRequest) -> list[tuple[str, str]]:
    """Returns what the jobs service refuses, by the paths inside the request."""
    try:
        checked_payload(JobPayload(generate=request), str(uuid.uuid4()))
    except InvalidArgument as error:
        return [
            (field.removeprefix("payload.generate."), text)
            for field, text in error.field_violations
        ]
    return []


@given(REQUESTS)
def test_jobs_and_calls_refuse_the_same_requests(request: GenerateRequest) -> None:
    """With the same fields and the same words: an accepted job is never refused when it runs."""
    assert wrong_fields_in_a_call(request) == wrong_fields_in_a_job(request)


@pytest.mark.parametrize(("field", "value"), [("priority", 77), ("resume_from", "-3")])
def test_a_job_is_refused_for_every_field(field: str, value: Any) -> None:
    """Also for those that matter only once it runs."""
    fields: dict[str, Any] = {field: value}
    request = GenerateRequest(model="smollm2", messages=[HELLO], **fields)
    assert [wrong for wrong, _ in wrong_fields_in_a_job(request)] == [field]
