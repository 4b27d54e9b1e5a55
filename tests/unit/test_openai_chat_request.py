"""Reading OpenAI's chat requests."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.openai.chat_request import ChatRequest, parse_chat_completion

_HELLO = {"model": "smollm2", "messages": [{"role": "user", "content": "hello"}]}


def _parse(**members: object) -> ChatRequest:
    return parse_chat_completion(json.dumps(_HELLO | members).encode())


def _refused_field(body: bytes) -> str:
    with pytest.raises(InvalidArgument) as caught:
        parse_chat_completion(body)
    assert caught.value.reason == "INVALID_FIELD"
    return caught.value.field_violations[0][0]


def test_members_that_are_not_set_are_none():
    """Defaults belong to the inference service."""
    assert _parse(temperature=None, stop=None, stream_options=None) == ChatRequest(
        model="smollm2",
        messages=(("user", "hello"),),
        max_tokens=None,
        temperature=None,
        top_p=None,
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
    )


def test_every_field_arrives():
    """What a client sets reaches the generation."""
    assert _parse(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=-(2**40),
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
    ) == ChatRequest(
        model="smollm2",
        messages=(("user", "hello"),),
        max_tokens=7,
        temperature=0.0,
        top_p=0.5,
        seed=-(2**40),
        stop=("a", "b"),
        stream=True,
        include_usage=True,
    )


def test_one_stop_string_is_a_list_of_one():
    """`stop` may be a string."""
    assert _parse(stop="\n").stop == ("\n",)


def test_developers_speak_as_system_and_parts_become_lines():
    """Both forms of content and the newer role are read."""
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": "c", "tool_calls": []},
    ]
    assert _parse(messages=messages).messages == (
        ("system", "be brief"),
        ("user", "a\nb"),
        ("assistant", "c"),
    )


def test_harmless_fields_are_ignored():
    """Bookkeeping and neutral values have no effect."""
    assert (
        _parse(
            user="ann",
            metadata={"a": "b"},
            store=False,
            n=1,
            frequency_penalty=0,
            presence_penalty=0.0,
            logprobs=False,
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            logit_bias={},
        )
        == _parse()
    )


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("web_search_options", {}),
        ("logit_bias", {"50256": -100}),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -1),
        ("temperatur", 1),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", 10**400),
        ("max_tokens", 1.5),
        ("max_tokens", 2**31),
        ("seed", 2**63),
        ("stop", 3),
        ("stream", "true"),
        ("stream_options", {"include_usage": True}),
        ("model", ""),
        ("model", None),
        ("model", 3),
        ("messages", "hello"),
    ],
)
def test_unsupported_members_are_refused_by_name(member: str, value: object):
    """The error names the member."""
    assert _refused_field(json.dumps(_HELLO | {member: value}).encode()) == member


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("hello", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[1].content[0].type",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
            "messages[1].tool_calls",
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_path(message: object, path: str):
    """The path leads through lists and objects."""
    messages = [_HELLO["messages"][0], message]
    assert _refused_field(json.dumps(_HELLO | {"messages": messages}).encode()) == path


def test_both_names_of_the_token_limit_are_refused_together():
    """They might differ."""
    body = json.dumps(_HELLO | {"max_tokens": 1, "max_completion_tokens": 1}).encode()
    assert _refused_field(body) == "max_tokens"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"temperature": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes):
    """It is the caller's error, not an internal one."""
    assert _refused_field(body) == "body"


def test_half_a_surrogate_pair_is_refused():
    """JSON can express it, UTF-8 cannot; it must not fail later as an internal error."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert _refused_field(body) == "messages[0].content"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# Times depend on what else the machine does.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "stop", "stream", "n", "seed", "stream_options"]),
        _JSON,
    )
)
def test_any_json_is_read_or_refused(members: dict[str, object]):
    """Whatever the types, the outcome is a request or INVALID_ARGUMENT."""
    try:
        parse_chat_completion(json.dumps(members).encode())
    except InvalidArgument as error:
        assert error.field_violations  # noqa: PT017  # either outcome is right
