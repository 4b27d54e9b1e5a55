"""The caller's identity in the metadata of RPCs."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from libs.errors import InvalidArgument, Unauthenticated
from libs.rpc.identity import identity_of
from libs.rpc.status import headrace_errors
from tests.support.rpc import handled_by, value

pytestmark = pytest.mark.integration

_CALLER = (
    ("x-headrace-tenant", "acme"),
    ("x-headrace-user", "ann"),
    ("x-headrace-scopes", "infer read"),
    ("x-headrace-usage-id", "1"),
)


async def _who(_request: StringValue, context: Any) -> StringValue:
    identity = identity_of(context)
    return value(f"{identity.tenant} {identity.user} {sorted(identity.scopes)}")


async def test_the_metadata_names_the_caller():
    """As the edge sets it."""
    async with handled_by(unary_unary=_who) as calls:
        answer = await calls.unary_unary(value(""), metadata=_CALLER)
    assert answer.value == "acme ann ['infer', 'read']"


async def test_a_call_without_identity_is_refused():
    """It did not come through the edge."""
    async with handled_by(unary_unary=_who) as calls:
        with pytest.raises(Unauthenticated), headrace_errors():
            await calls.unary_unary(value(""))


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *(
            (key, wrong)
            for key in ("x-headrace-tenant", "x-headrace-user")
            for wrong in ("-", "a b", "a,b", "_a", "WyJhIl0=", "a" * 129, "a/b", "a" * 5000)
        ),
        *(("x-headrace-scopes", wrong) for wrong in ("infer,read", "infer  read", "INFER", "[1]")),
        *(("x-headrace-max-priority", wrong) for wrong in ("10", "-1", "2.5", "x", " 1", "")),
    ],
)
async def test_an_identity_of_another_form_is_refused(key: str, wrong: str):
    """The services do not rely on the edge: names go into ledgers, logs and names of resources."""
    metadata = {**dict(_CALLER), key: wrong}
    async with handled_by(unary_unary=_who) as calls:
        with pytest.raises(Unauthenticated) as raised, headrace_errors():
            await calls.unary_unary(value(""), metadata=tuple(metadata.items()))
    assert raised.value.reason == "TOKEN_INVALID"


@pytest.mark.parametrize("key", [key for key, _ in _CALLER])
async def test_an_identity_that_is_repeated_is_refused(key):
    """Otherwise the last value would be used, even one added by a client."""
    async with handled_by(unary_unary=_who) as calls:
        with pytest.raises(InvalidArgument) as raised, headrace_errors():
            await calls.unary_unary(value(""), metadata=(*_CALLER, (key, "victim")))
    assert raised.value.message == f"the header {key} must not be repeated"
