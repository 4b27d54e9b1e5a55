"""A request has no higher priority than its token allows, whatever carries it."""

from __future__ import annotations

from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from libs.chat.wire import text_message
from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.integration

GENERATE = "/headrace.inference.v1.InferenceService/Generate"
SUBMIT = "/headrace.jobs.v1.JobService/SubmitJob"


def _request(priority: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model="smollm2",
        messages=[text_message(inference_pb2.ROLE_USER, "hello")],
        max_tokens=1,
        priority=priority,
    )


async def _generate(channel: grpc.aio.Channel, priority: int, metadata: Any) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    _ = [event async for event in stub.Generate(_request(priority), metadata=metadata)]


async def _submit(channel: grpc.aio.Channel, priority: int, metadata: Any) -> None:
    request = jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(generate=_request(priority)))
    await jobs_pb2_grpc.JobServiceStub(channel).SubmitJob(request, metadata=metadata)


@pytest.mark.parametrize("call", [_generate, _submit])
async def test_a_priority_above_the_tokens_is_refused(mesh: RunningMesh, call: Any):
    """With its own reason; up to it, everything is allowed."""
    async with mesh.channel() as channel:
        for highest in (0, 4, 9):
            metadata = mesh.metadata(max_priority=highest)
            await call(channel, highest, metadata)
            if highest == 9:
                break
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, highest + 1, metadata)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            info = error_details_pb2.ErrorInfo()
            status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # it is a call
            assert status is not None
            assert status.details[0].Unpack(info)
            assert info.reason == "PRIORITY_NOT_ALLOWED"
            assert info.metadata == {"max_priority": str(highest)}


@pytest.mark.parametrize("path", [GENERATE, SUBMIT])
async def test_json_is_no_way_around(mesh: RunningMesh, path: str):
    """Neither are headers that name another priority."""
    generate = {
        "model": "smollm2",
        "messages": [{"role": "ROLE_USER", "parts": [{"text": "hello"}]}],
        "priority": 1,
    }
    body = generate if path == GENERATE else {"payload": {"generate": generate}}
    headers = {
        "authorization": f"Bearer {mesh.token()}",
        "x-headrace-max-priority": "9",
        "X-Headrace-Max-Priority": "9",
    }
    async with (
        aiohttp.ClientSession(mesh.url) as http,
        http.post(path, json=body, headers=headers) as response,
    ):
        assert response.status == 403
        answer = await response.json()
    assert answer["details"][0]["reason"] == "PRIORITY_NOT_ALLOWED"


async def test_a_priority_that_cannot_be_is_an_invalid_field(mesh: RunningMesh):
    """Whatever the token allows."""
    async with mesh.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _generate(channel, 10, mesh.metadata(max_priority=9))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
