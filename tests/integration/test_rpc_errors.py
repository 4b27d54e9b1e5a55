"""Errors pass from one service to the next unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from libs.errors import BY_CODE, Internal, InvalidArgument, NotFound, Unavailable, Unimplemented
from libs.rpc.status import headrace_errors
from tests.support.rpc import CALLER, Calls, handled_by, value

Handler = Callable[[Any, Any], Any]

pytestmark = pytest.mark.integration


def raising(error: Exception) -> tuple[Handler, Handler, Handler]:
    async def unary(request: Any, context: Any) -> None:
        raise error

    async def generator(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield value("first")
        raise error

    async def writer(request: Any, context: Any) -> None:
        await context.write(value("first"))
        raise error

    return unary, generator, writer


async def read_all(call: Any) -> list[str]:
    return [message.value async for message in call]


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=BY_CODE)
async def test_every_error_arrives_as_the_class_it_was_raised_as(kind):
    """With its reason, metadata, retry delay, fields and resource."""
    error = kind(
        "the text",
        reason="MODEL_NOT_FOUND",
        metadata={"model": "gpt-9", "models": "a,b"},
        retry_after_seconds=1.5,
        field_violations=[("a.b", "is wrong"), ("c", "too")],
        resource="models/gpt-9",
    )
    unary, generator, _ = raising(error)
    async with handled_by(unary_unary=unary, unary_stream=generator) as calls:
        for call in (calls.unary_unary(value("")), read_all(calls.unary_stream(value("")))):
            with pytest.raises(kind) as raised, headrace_errors():
                await call
            assert type(raised.value) is kind
            assert vars(raised.value) == vars(error)


async def test_an_error_in_mid_stream_follows_what_was_sent():
    """Whether the handler yields or writes."""
    _, generator, writer = raising(Unavailable("no", reason="BACKEND_FAILED"))
    for handler in (generator, writer):
        async with handled_by(unary_stream=handler) as calls:
            call = calls.unary_stream(value(""))
            assert (await call.read()).value == "first"
            with pytest.raises(Unavailable), headrace_errors():
                await call.read()


async def test_anything_else_is_internal_and_leaks_nothing():
    """Its text may contain user data; only the log has it."""
    for handler in raising(ValueError("secret-7"))[:2]:
        kind = "unary_unary" if handler.__name__ == "unary" else "unary_stream"
        async with handled_by(**{kind: handler}) as calls:
            call = getattr(calls, kind)(value(""))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await (call if kind == "unary_unary" else read_all(call))
        status = rpc_status.from_call(cast("Any", raised.value))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert "secret-7" not in str(status) + str(raised.value.details())
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.reason == "INTERNAL"


async def test_a_callees_error_passes_through_a_service_unchanged():
    """A service in between need not catch what it cannot handle."""
    unary, *_ = raising(NotFound.of_resource("models/a"))
    async with handled_by(unary_unary=unary) as callee:

        async def caught(request, context):
            with headrace_errors():
                return await callee.unary_unary(request)

        async def uncaught(request, context):
            return await callee.unary_unary(request)

        for handler in (caught, uncaught):
            async with handled_by(unary_unary=handler) as calls:
                with pytest.raises(NotFound) as raised, headrace_errors():
                    await calls.unary_unary(value(""))
                assert raised.value.metadata == {"resource": "models/a"}


async def test_a_reason_of_a_newer_callee_passes_through_an_older_service():
    """Services are not replaced all at once."""
    newer = Unavailable("new trouble", reason="MODEL_NOT_READY", metadata={"model": "a"})

    async def unknown_reason(request, context):
        newer.reason = "SOMETHING_NEW"
        raise newer

    async with handled_by(unary_unary=unknown_reason) as calls:
        with pytest.raises(Unavailable) as raised, headrace_errors():
            await calls.unary_unary(value(""))
    assert raised.value.reason in {"SOMETHING_NEW", "INTERNAL", "DEPENDENCY_UNAVAILABLE"}


@pytest.mark.parametrize("text", ["x", "é", "語", "😀", "%", "\n"])
async def test_an_error_that_is_too_long_is_cut(text):
    """Trailers are limited: a longer error would arrive as another one."""
    error = InvalidArgument(
        text * 100_000,
        reason="INVALID_FIELD",
        metadata={"model": text * 100_000, "models": text * 100_000},
        field_violations=[(text * 1000, text * 1000)] * 100,
        resource=text * 10_000,
    )
    unary, *_ = raising(error)
    async with handled_by(unary_unary=unary) as calls:
        with pytest.raises(InvalidArgument) as raised, headrace_errors():
            await calls.unary_unary(value(""))
    assert raised.value.reason == "INVALID_FIELD"
    assert raised.value.message.startswith(text * 50)
    assert raised.value.metadata["model"].startswith(text * 10)
    assert raised.value.field_violations


async def test_an_unknown_method_is_unimplemented():
    """With `ErrorInfo`, like every error."""
    async with handled_by() as calls:
        with pytest.raises(Unimplemented) as raised, headrace_errors():
            await calls.unary_unary(value(""))
    assert raised.value.reason == "METHOD_NOT_FOUND"


async def test_a_message_that_is_too_large_is_refused_with_the_limit():
    """GRPC itself would report `RESOURCE_EXHAUSTED` without details."""

    async def unary(request, context):
        return request

    async with handled_by(False, CALLER, unary_unary=unary) as calls:
        assert await calls.unary_unary(value("x" * 4_000_000))
        with pytest.raises(InvalidArgument) as raised, headrace_errors():
            await calls.unary_unary(value("x" * 5_000_000))
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    assert raised.value.metadata == {"limit_bytes": str(4 * 1024 * 1024)}


async def test_an_unreachable_dependency_is_reported_without_its_address():
    """Users must not see internal addresses."""
    async with grpc.aio.insecure_channel("127.0.0.1:9") as nowhere:

        async def handler(request, context):
            with headrace_errors():
                await Calls(nowhere).unary_unary(value(""))

        async with handled_by(unary_unary=handler) as calls:
            with pytest.raises(Unavailable) as raised, headrace_errors():
                await calls.unary_unary(value(""))
    assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert "127.0.0.1" not in raised.value.message
    assert raised.value.retry_after_seconds is not None


async def test_an_unexpected_error_of_a_callee_stays_internal():
    """The texts of foreign services are not passed on."""

    async def foreign(request, context):
        await context.abort(grpc.StatusCode.DATA_LOSS, "secret-7")

    async with handled_by(unary_unary=foreign) as callee:

        async def handler(request, context):
            return await callee.unary_unary(request)

        async with handled_by(unary_unary=handler) as calls:
            with pytest.raises(Internal) as raised, headrace_errors():
                await calls.unary_unary(value(""))
    assert "secret-7" not in raised.value.message
