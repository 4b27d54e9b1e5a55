"""Invalid work is refused when it is submitted, field by field."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from headrace.embedding.v1.embedding_pb2 import EmbedRequest
from headrace.inference.v1.inference_pb2 import ROLE_USER, GenerateRequest, Message
from headrace.jobs.v1.jobs_pb2 import JobPayload

from libs.chat.wire import text_message
from libs.embedding_texts import MAX_TEXTS_BYTES, check_texts
from libs.errors import InvalidArgument
from services.jobs.payload import checked_payload
from services.jobs.wire import job_id_of_name, payload_to_bytes

JOB_ID = str(uuid.uuid4())
HELLO = text_message(ROLE_USER, "hello")


def generate(**fields: Any) -> JobPayload:
    return JobPayload(
        generate=GenerateRequest(**{"model": "smollm2", "messages": [HELLO], **fields})
    )


def embed(**fields: Any) -> JobPayload:
    return JobPayload(embed=EmbedRequest(**{"model": "minilm", "texts": ["a"], **fields}))


def violations(payload: JobPayload) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        checked_payload(payload, JOB_ID)
    assert caught.value.reason == "INVALID_FIELD"
    return [field for field, _ in caught.value.field_violations]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"model": ""}, ["model"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [HELLO] * 1025}, ["messages"]),
        ({"messages": [HELLO, Message(parts=HELLO.parts)]}, ["messages[1].role"]),
        ({"max_tokens": 0}, ["max_tokens"]),
        ({"temperature": -0.1}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": 2.5}, ["temperature"]),
        ({"top_p": 0.0}, ["top_p"]),
        ({"top_p": 1.5}, ["top_p"]),
        ({"seed": -1}, ["seed"]),
        ({"stop": ["a"] * 5}, ["stop"]),
        ({"stop": ["a", ""]}, ["stop[1]"]),
        ({"stop": ["\u20ac" * 86]}, ["stop[0]"]),
        ({"request_id": "7"}, ["request_id"]),
        ({"request_id": JOB_ID.upper()}, ["request_id"]),
        ({"model": "", "messages": [], "max_tokens": -1}, ["model", "messages", "max_tokens"]),
    ],
)
def test_a_wrong_generation_is_refused_by_field(fields: dict[str, Any], wrong: list[str]) -> None:
    """All violations at once, by their paths in the request."""
    assert violations(generate(**fields)) == [f"payload.generate.{field}" for field in wrong]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"model": ""}, ["model"]),
        ({"texts": []}, ["texts"]),
        ({"texts": ["a"] * 2049}, ["texts"]),
        ({"texts": ["a", "", ""]}, ["texts[1]"]),
        ({"request_id": "7", "texts": []}, ["request_id", "texts"]),
    ],
)
def test_a_wrong_embedding_is_refused_by_field(fields: dict[str, Any], wrong: list[str]) -> None:
    """Likewise."""
    assert violations(embed(**fields)) == [f"payload.embed.{field}" for field in wrong]


def test_texts_that_are_too_large_are_refused_as_in_a_call() -> None:
    """Before the job is accepted, not when it runs."""
    texts = ["a" * (MAX_TEXTS_BYTES + 1)]
    with pytest.raises(InvalidArgument) as caught:
        checked_payload(embed(texts=texts), JOB_ID)
    with pytest.raises(InvalidArgument) as of_a_call:
        check_texts(texts, field="payload.embed.texts")
    assert str(caught.value) == str(of_a_call.value)
    assert caught.value.reason == of_a_call.value.reason == "MESSAGE_TOO_LARGE"


def test_a_job_without_work_is_refused() -> None:
    """Neither is set."""
    assert violations(JobPayload()) == ["payload"]


@pytest.mark.parametrize("payload", [generate(), embed()], ids=["generate", "embed"])
def test_the_request_takes_the_id_of_the_job(payload: JobPayload) -> None:
    """So that the cost of a job is found under its id; the caller's message stays as it is."""
    before = payload.SerializeToString()
    checked = checked_payload(payload, JOB_ID)
    work = checked.generate if checked.HasField("generate") else checked.embed
    assert work.request_id == JOB_ID
    assert payload.SerializeToString() == before


def test_a_request_id_of_the_client_stays() -> None:
    """It is the client's to choose."""
    own = str(uuid.uuid4())
    assert checked_payload(generate(request_id=own), JOB_ID).generate.request_id == own


def test_equal_payloads_are_equal_as_bytes() -> None:
    """Whether the request's id was left out or given as the job's."""
    one = payload_to_bytes(checked_payload(generate(max_tokens=5), JOB_ID))
    two = payload_to_bytes(checked_payload(generate(max_tokens=5, request_id=JOB_ID), JOB_ID))
    other = payload_to_bytes(checked_payload(generate(max_tokens=6), JOB_ID))
    assert one == two != other


@pytest.mark.parametrize(
    "name", ["", "jobs", "jobs/", JOB_ID, f"job/{JOB_ID}", "jobs/7", f"jobs/{JOB_ID}/"]
)
def test_an_invalid_name_is_refused(name: str) -> None:
    """`jobs/` and a canonical UUID, nothing else."""
    with pytest.raises(InvalidArgument):
        job_id_of_name(name)
    assert job_id_of_name(f"jobs/{JOB_ID}") == JOB_ID
