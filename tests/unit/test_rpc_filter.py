"""The filters of lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.rpc.filter import parse_filter

FIELDS = ("user", "model", "spec.pool")

values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
conditions = st.dictionaries(st.sampled_from(FIELDS), values)
spaces = st.text(" \t\n", max_size=3)


def quote(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ('user = "ada"', {"user": "ada"}),
        ('user="ada"', {"user": "ada"}),
        ('user = ""', {"user": ""}),
        ('user = "ada" AND model = "smollm2"', {"user": "ada", "model": "smollm2"}),
        ('spec.pool = "a AND user = b"', {"spec.pool": "a AND user = b"}),
        (r'user = "a\"b\\"', {"user": 'a"b\\'}),
    ],
)
def test_a_filter_is_conditions_joined_by_and(text, expected):
    """The examples of `protos/README.md` and the edges of its rules."""
    assert parse_filter(text, fields=FIELDS) == expected


@given(conditions, st.data())
def test_every_value_can_be_asked_for(expected, data):
    """Quotes, backslashes, line breaks and operators in values, and any spaces around the parts."""

    def space(least: int = 0) -> str:
        return " " * least + str(data.draw(spaces))

    parts = [
        f"{space()}{field}{space()}={space()}{quote(value)}" for field, value in expected.items()
    ]
    text = f"{space(1)}AND{space(1)}".join(parts) + space()
    assert parse_filter(text, fields=FIELDS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "user",
        "user =",
        "user = ada",
        "user = 'ada'",
        'user = "ada',
        'user != "ada"',
        'user = "ada" OR model = "m"',
        'user = "ada" and model = "m"',
        'user = "ada"AND model = "m"',
        'user = "ada" ANDmodel = "m"',
        'user = "ada" AND',
        'user = "ada" AND ',
        'AND user = "ada"',
        'user = "ada" AND AND model = "m"',
        'user = "ada", model = "m"',
        '(user = "ada")',
        'NOT user = "ada"',
        'user = "ada" AND user = "ada"',
        'tenant = "acme"',
        'USER = "ada"',
        '"ada" = user',
        'user = "a\\nb"',
        'user = "a\0"',
        "\\",
        "\0",
    ],
)
def test_anything_else_is_refused(text):
    """If a part of a filter were ignored, unrequested rows would be returned."""
    with pytest.raises(InvalidArgument) as raised:
        parse_filter(text, fields=FIELDS)
    assert raised.value.reason == "INVALID_FIELD"
    assert raised.value.field_violations[0][0] == "filter"


@given(st.text() | st.text('user=" \\AND.'))
def test_no_text_breaks_the_parser(text):
    """Whatever a client sends is a filter or an error of the field."""
    try:
        assert set(parse_filter(text, fields=FIELDS)) <= set(FIELDS)
    except InvalidArgument as error:
        assert error.field_violations[0][0] == "filter"  # noqa: PT017  # both outcomes are allowed


def test_a_huge_filter_is_parsed_in_linear_time():
    """A hostile text does not stall the process."""
    many = "\\" * 200_000
    assert parse_filter(f'user = "{many}"', fields=FIELDS) == {"user": "\\" * 100_000}
    with pytest.raises(InvalidArgument):
        parse_filter(f'user = "{many}', fields=FIELDS)
    with pytest.raises(InvalidArgument):
        parse_filter("a" * 200_000, fields=FIELDS)
