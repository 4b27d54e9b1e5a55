"""A token permits the calls of its scopes, and no others: all methods of all services are tried."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from deploy import keys
from libs.rpc.access import INTERNAL, scope_of
from tests.support.mesh import RunningMesh
from tests.support.protos import all_methods, path_of

pytestmark = pytest.mark.integration

CALL_SECONDS = 10.0


@pytest.mark.parametrize("scopes", [*keys.SCOPES, ""])
async def test_a_token_permits_the_calls_of_its_scopes_only(mesh: RunningMesh, scopes: str):
    """Through the edge to the real services: without its scope no method works, internal never."""
    permitted = {path_of(m) for m in all_methods() if scope_of(m) in scopes.split()}
    refused = {path_of(m): scope_of(m) for m in all_methods()}
    async with mesh.channel() as channel:
        missing = {path: await _missing_scope(channel, mesh, path, scopes) for path in refused}
    for path, scope in refused.items():
        assert missing[path] == ("" if path in permitted else scope), path


async def test_no_token_permits_internal_calls(mesh: RunningMesh):
    """Not even one with all scopes that tokens can have."""
    async with mesh.channel() as channel:
        for method in all_methods():
            if scope_of(method) == INTERNAL:
                path = path_of(method)
                assert await _missing_scope(channel, mesh, path, " ".join(keys.SCOPES)) == INTERNAL


async def _missing_scope(
    channel: grpc.aio.Channel, mesh: RunningMesh, path: str, scopes: str
) -> str:
    """Calls a method with an empty message; returns the scope that the error asks for, if any."""
    call = channel.unary_stream(path, bytes, bytes)(
        b"", metadata=mesh.metadata(scopes=scopes), timeout=CALL_SECONDS
    )
    try:
        async with asyncio.timeout(CALL_SECONDS):
            async for _ in call:
                return ""  # it works, and a watch would last
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            return ""
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an error is a call
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.domain, info.reason) == ("headrace", "SCOPE_MISSING")
        return str(info.metadata["scope"])
    finally:
        call.cancel()
    return ""
