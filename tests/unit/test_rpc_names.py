"""Names of resources and models, and the pages of lists."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.model_reference import (
    ModelReference,
    at_version,
    parse_version_name,
    version_name,
    version_of,
)
from libs.rpc.names import parse_name, resource_name
from libs.rpc.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Page, PageRequest

identifiers = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)


@given(identifiers)
def test_a_name_is_parsed_as_it_was_made(identifier):
    """Every identifier that the contract allows."""
    assert parse_name(resource_name("models", identifier), "models") == identifier
    model, version = parse_version_name(version_name(identifier, "1.2.3-rc.1+b"))
    assert (model, str(version)) == (identifier, "1.2.3-rc.1+b")


@pytest.mark.parametrize(
    "name",
    [
        "models/smollm2/versions/1.0",
        "models/smollm2/versions/01.0.0",
        "models/smollm2/versions/1.0.0\n",
        "models/smollm2/versions/1.0.0/",
        "models/smollm2/versions/../../x",
        "models/smollm2/versions/1.0.0/versions/1.0.0",
        "models/versions/1.0.0",
        "deployments/smollm2/versions/1.0.0",
        "models/smollm2/versions/1.0.٣",
        "models/smollm2/versions/1.0.0-" + "a" * 60,
        "models/a\n/versions/1.0.0",
    ],
)
def test_an_invalid_version_name_is_refused(name):
    """It becomes part of paths."""
    with pytest.raises(InvalidArgument) as raised:
        parse_version_name(name, field="f")
    assert raised.value.field_violations[0][0] == "f"


@given(identifiers)
def test_a_reference_is_read_in_each_of_its_forms(identifier):
    """And written as users write it."""
    assert ModelReference.parse(identifier) == (identifier, None)
    assert str(ModelReference.parse(identifier)) == identifier
    for text in (at_version(identifier, "1.2.3-rc.1"), version_name(identifier, "1.2.3-rc.1")):
        reference = ModelReference.parse(text)
        assert (reference.model, str(reference.version)) == (identifier, "1.2.3-rc.1")
        assert str(reference) == f"{identifier}@1.2.3-rc.1"
    assert version_of(version_name(identifier, "1.2.3-rc.1")) == "1.2.3-rc.1"


@pytest.mark.parametrize(
    "text",
    ["", "@", "@1.0.0", "smollm2@", "smollm2@1", "smollm2@latest", "smollm2@1.0.0@1.0.0", "Smollm2",
     "smollm2/1.0.0", "models/smollm2", "models/smollm2@1.0.0", "smollm2 ", "smollm2\n",
     "a" * 64, "smollm2@1.0.0-" + "a" * 60],
)  # fmt: skip
def test_an_invalid_reference_is_refused_with_an_example(text):
    """A user sees what the forms are."""
    with pytest.raises(InvalidArgument) as raised:
        ModelReference.parse(text)
    ((field, description),) = raised.value.field_violations
    assert field == "model"
    assert "1.0.0" in description


@given(st.sets(identifiers, max_size=30).map(sorted), st.integers(1, 10))
def test_pages_have_each_row_once_in_order(rows, size):
    """For any page size."""
    found: list[str] = []
    token = ""
    while True:
        request = PageRequest.parse(size, token)
        page = Page.of(
            [row for row in rows if row > request.after][: request.limit], request, key=str
        )
        assert len(page.rows) <= size
        found += page.rows
        token = page.next_page_token
        if not token:
            break
    assert found == rows


def test_page_sizes_have_a_default_and_a_limit():
    """As the contract says."""
    assert PageRequest.parse(0, "").size == DEFAULT_PAGE_SIZE
    assert PageRequest.parse(10**9, "").size == MAX_PAGE_SIZE
    with pytest.raises(InvalidArgument) as raised:
        PageRequest.parse(-1, "")
    assert raised.value.field_violations[0][0] == "page_size"


@given(st.text())
def test_a_page_token_is_parsed_or_refused(token):
    """Whatever a client sends, it is never an internal error."""
    with suppress(InvalidArgument):
        assert "\0" not in PageRequest.parse(1, token).after
