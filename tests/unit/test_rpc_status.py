"""`HeadraceError` to `google.rpc.Status`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from headrace.common.v1 import error_reason_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs import errors
from libs.errors import BY_CODE, InvalidArgument, forget_frames
from libs.rpc.status import cut, to_status

ROOT = Path(__file__).parents[2]
# Of the 8 KiB that gRPC takes of trailers, what is left to other keys.
SPARE_BYTES = 512

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=400).map(lambda text: text * 20)


@given(
    message=texts,
    metadata=st.dictionaries(st.sampled_from(["model", "models", "resource"]), texts),
    violations=st.lists(st.tuples(texts, texts), max_size=20),
    resource=texts,
)
def test_a_status_always_fits_into_trailers(message, metadata, violations, resource):
    """With the longest percent-encoded message and base64 details."""
    status = to_status(
        InvalidArgument(
            message,
            reason="INVALID_FIELD",
            metadata=metadata,
            retry_after_seconds=1.0,
            field_violations=violations,
            resource=resource,
        )
    )
    size = 3 * len(status.message.encode()) + 4 * (status.ByteSize() // 3 + 1)
    assert size < 8192 - SPARE_BYTES


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(3, 40))
def test_a_cut_text_is_the_start_of_the_text(text, limit):
    """No character is split, and an ellipsis shows the cut."""
    shortened = cut(text, limit)
    assert len(shortened.encode()) <= limit
    if shortened != text:
        assert shortened.endswith("…")
        assert text.startswith(shortened[:-1])


def test_small_metadata_survives_beside_large():
    """The model that was asked for is kept, the list of all models is cut."""
    error = InvalidArgument(
        "text", reason="INVALID_FIELD", metadata={"models": "x" * 9000, "model": "gpt-9"}
    )
    info = to_status(error).details[0].value
    assert b"gpt-9" in info
    assert b"xxxx" in info


def reasons_in(path: Path) -> Iterator[str]:
    """Yields the constant reasons of the errors that a file makes."""
    kinds = {kind.__name__ for kind in BY_CODE.values()} | {"cls"}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        if getattr(name, "id", name) not in kinds:
            continue
        for keyword in node.keywords:
            if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                yield str(keyword.value.value)


def test_every_reason_in_the_code_is_one_of_the_contract():
    """Clients switch on reasons: one that is not in the proto is a typing error."""
    values = error_reason_pb2.ErrorReason.DESCRIPTOR.values
    known = {value.name.removeprefix("ERROR_REASON_") for value in values}
    found = {
        (path.relative_to(ROOT), reason)
        for folder in ("libs", "services")
        for path in (ROOT / folder).rglob("*.py")
        if "gen" not in path.parts
        for reason in reasons_in(path)
    }
    assert (Path("libs/errors.py"), "RESOURCE_EXISTS") in found
    assert [one for one in found if one[1] not in known] == []


def test_every_status_code_has_one_class():
    """The tree in the docstring of `libs.errors` is the tree."""
    assert errors.__doc__ is not None
    assert all(kind.code in errors.__doc__ for kind in BY_CODE.values())


def test_an_error_can_forget_what_it_came_through():
    """Its causes, too; what it says stays."""

    def fail() -> None:
        try:
            int("inner")
        except ValueError as error:
            raise InvalidArgument("outer", reason="INVALID_FIELD") from error

    with pytest.raises(InvalidArgument) as caught:
        fail()
    forget_frames(caught.value)
    assert caught.value.__traceback__ is None
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__traceback__ is None
    assert caught.value.message == "outer"
