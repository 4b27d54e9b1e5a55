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


@pytest.mark.parametrize("key", [key for key, _ in _CALLER])
async def test_an_identity_that_is_repeated_is_refused(key):
    """Otherwise the last value would be used, even one added by a client."""
    async with handled_by(unary_unary=_who) as calls:
        with pytest.raises(InvalidArgument) as raised, headrace_errors():
            await calls.unary_unary(value(""), metadata=(*_CALLER, (key, "victim")))
    assert raised.value.message == f"the header {key} must not be repeated"
