"""OpenAI's chat responses, checked with the types of the `openai` package."""

from __future__ import annotations

import json

from headrace.common.v1 import usage_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from libs.errors import InvalidArgument, NotFound, Unavailable
from libs.openai.bodies import Served, list_object, model_object, to_json
from libs.openai.chat_response import ChunkWriter, completion_object
from libs.openai.errors import error_event, error_object

_USAGE = usage_pb2.TokenUsage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
_SERVED = Served(
    model_version="models/smollm2/versions/1.0.0",
    artifact_digest="sha256:" + "ab" * 32,
    deployment="deployments/smollm2",
    route_reason="the only deployment",
    cost_nano_usd=12_345,
    request_id="0198c5f0-0000-7000-8000-000000000000",
    trace_id="c" * 32,
)


def _writer(*, include_usage: bool = False) -> ChunkWriter:
    return ChunkWriter(
        model="smollm2",
        created_seconds=1_800_000_000,
        request_id=_SERVED.request_id,
        include_usage=include_usage,
    )


def _read(events: bytes) -> list[ChatCompletionChunk]:
    """Reads events as a client does: by lines."""
    chunks = []
    for line in events.decode().splitlines():
        if line:
            assert line.startswith("data: ")
            chunks.append(ChatCompletionChunk.model_validate_json(line[6:], strict=True))
    return chunks


def test_a_completion_is_what_the_openai_package_expects():
    """It passes the client's own types, and has version and cost besides."""
    answer = completion_object(
        model="smollm2",
        created_seconds=1_800_000_000,
        content="höllo",
        finish_reason="stop",
        usage=_USAGE,
        served=_SERVED,
    )
    read = ChatCompletion.model_validate_json(to_json(answer), strict=True)
    assert read.choices[0].message.content == "höllo"
    assert read.choices[0].finish_reason == "stop"
    assert read.usage is not None
    assert read.usage.total_tokens == 8
    assert read.usage.prompt_tokens_details is not None
    assert read.usage.prompt_tokens_details.cached_tokens == 2
    assert read.system_fingerprint == "fp_abababababab"
    assert read.model_extra is not None
    assert read.model_extra["headrace"]["cost_nano_usd"] == 12_345


def test_a_stream_is_what_the_openai_package_expects():
    """Role, text, end: each chunk passes the client's own types."""
    writer = _writer()
    events = (
        writer.role() + writer.delta("a") + writer.delta("b") + writer.finish("length", _SERVED)
    )
    chunks = _read(events)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "a", "b", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert {chunk.id for chunk in chunks} == {f"chatcmpl-{_SERVED.request_id}"}
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_usage_comes_last_and_is_null_before():
    """With `include_usage` every chunk has the member, the last one filled and without choices."""
    writer = _writer(include_usage=True)
    events = (
        writer.role() + writer.delta("a") + writer.finish("stop", _SERVED) + writer.usage(_USAGE)
    )
    *before, last = _read(events)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in before)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


# Times depend on what else the machine does.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_event(text: str):
    """Quotes, all kinds of line breaks and all scripts arrive unchanged, in one event."""
    event = _writer().delta(text)
    assert event.endswith(b"\n\n")
    assert b"\n" not in event[:-2]
    assert b"\r" not in event
    chunk = ChatCompletionChunk.model_validate(json.loads(event.removeprefix(b"data: ")))
    assert chunk.choices[0].delta.content == text


def test_errors_have_the_shape_of_openai():
    """Message, type, param and code are present, null if empty."""
    wrong = InvalidArgument.of_field("messages[0].role", "must be set")
    assert error_object(wrong) == {
        "error": {
            "message": "messages[0].role: must be set",
            "type": "invalid_request_error",
            "param": "messages[0].role",
            "code": "invalid_field",
        }
    }
    missing = NotFound("no model gpt-9", reason="MODEL_NOT_FOUND")
    assert error_object(missing) == {
        "error": {
            "message": "no model gpt-9",
            "type": "not_found_error",
            "param": None,
            "code": "model_not_found",
        }
    }


def test_an_error_in_mid_stream_is_one_event():
    """A client that reads events gets the error instead of a normal end."""
    event = error_event(Unavailable("line\nbreak", reason="BACKEND_FAILED"))
    assert event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "backend_failed"


def test_models_are_what_the_openai_package_expects():
    """The list of models holds the client's own type."""
    listed = list_object([model_object("smollm2"), model_object("minilm")])
    assert listed["object"] == "list"
    models = [Model.model_validate(item, strict=True) for item in listed["data"]]  # type: ignore[attr-defined]  # a list under `object`
    assert [model.id for model in models] == ["smollm2", "minilm"]
