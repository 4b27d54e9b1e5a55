"""The rules of a generation request, and that every service applies the same ones."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from headrace.inference.v1.inference_pb2 import GenerateRequest, Message
from headrace.jobs.v1.jobs_pb2 import JobPayload
from hypothesis import given
from hypothesis import strategies as st

from libs.chat.request import MAX_MESSAGES, GenerationRequest
from libs.chat.request import Message as PlainMessage
from libs.clock import SystemClock
from libs.errors import InvalidArgument
from services.inference.api import convert
from services.jobs.payload import checked_payload

GOOD = GenerationRequest(model="smollm2", messages=(PlainMessage("user", "hello"),))
HELLO = Message(role="user", content="hello")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"request_id": "7"}, "request_id"),
        ({"model": ""}, "model"),
        ({"messages": ()}, "messages"),
        ({"messages": (PlainMessage("user", "x"),) * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": (PlainMessage("tool", "x"),)}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("a",) * 5}, "stop"),
        ({"priority": 77}, "priority"),
        ({"priority": -1}, "priority"),
        ({"resume_from": -3}, "resume_from"),
        ({"resume_from": 3, "temperature": 1.0}, "resume_from"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], wrong: str) -> None:
    """The violation has the path of the field."""
    assert [field for field, _ in replace(GOOD, **fields).violations()] == [wrong]


def test_a_valid_request_has_no_violations() -> None:
    """Also with every field set."""
    request = replace(
        GOOD,
        request_id=str(uuid.uuid4()),
        max_tokens=1,
        temperature=2.0,
        top_p=1.0,
        seed=0,
        stop=("a",) * 4,
        priority=9,
        resume_from=3,
    )
    assert request.violations() == []


def mostly(valid: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> Any:
    """Draws valid values more often than wrong ones, so that some requests are valid."""
    return st.one_of(valid, valid, valid, wrong)


REQUESTS = st.builds(
    GenerateRequest,
    request_id=mostly(st.just("") | st.uuids().map(str), st.text(max_size=8)),
    model=mostly(st.just("smollm2"), st.just("")),
    messages=mostly(
        st.lists(
            st.builds(Message, role=st.sampled_from(["user", "assistant", "system"])),
            min_size=1,
            max_size=3,
        ),
        st.lists(st.builds(Message, role=st.text(max_size=6)), max_size=2),
    ),
    max_tokens=mostly(st.none() | st.integers(1, 4096), st.integers(-2, 0)),
    temperature=mostly(st.none() | st.floats(0, 2), st.floats(width=32)),
    top_p=mostly(st.none() | st.floats(0.01, 1), st.floats(width=32)),
    seed=mostly(st.none() | st.integers(0, 2**62), st.integers(-9, -1)),
    stop=mostly(
        st.lists(st.text(min_size=1, max_size=9), max_size=4),
        st.lists(st.text(max_size=90), max_size=6),
    ),
    priority=mostly(st.integers(0, 9), st.integers(-99, 99)),
    resume_from=mostly(st.integers(0, 9), st.integers(-9, -1)),
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


@pytest.mark.parametrize(("field", "value"), [("priority", 77), ("resume_from", -3)])
def test_a_job_is_refused_for_every_field(field: str, value: int) -> None:
    """Also for those that matter only once it runs."""
    fields: dict[str, Any] = {field: value}
    request = GenerateRequest(model="smollm2", messages=[HELLO], **fields)
    assert [wrong for wrong, _ in wrong_fields_in_a_job(request)] == [field]
