"""A model fails on a request: its text reaches nobody, and no other tenant is refused it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from libs.chat.wire import text_message
from libs.rpc.status import from_rpc_error
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.models import CHAT_CONFIG, deploy
from tests.support.triton_server import infer_request

pytestmark = pytest.mark.integration

CANARY = "canary-7b1d"
# Models that raise: in Python, as Triton's errors with each code, and as JSON out of the contract.
WAYS = ("raise", "INTERNAL", "INVALID_ARG", "UNKNOWN", "NOT_FOUND", "json")

CHAT = f"""
import json
import numpy as np
import triton_python_backend_utils as pb_utils

CANARY = "{CANARY}"

def fail(way):
    if way == "raise":
        raise ValueError(f"{{CANARY}} in the prompt")
    broken = json.dumps({{"reason": "BROKEN", "message": CANARY}})
    text = broken if way == "json" else f"{{CANARY}}\\n/srv"
    code = getattr(pb_utils.TritonError, "INTERNAL" if way == "json" else way)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))

class TritonPythonModel:
    def execute(self, requests):
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        for request in requests:
            body = json.loads(pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0])
            content = body["messages"][0]["content"]
            if content.startswith("fail "):
                request.get_response_sender().send(fail(content.split()[1]), flags=final)
                continue
            counts = dict(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
            end = {{"finish_reason": "stop", **counts}}
            request.get_response_sender().send(
                pb_utils.InferenceResponse([
                    pb_utils.Tensor("text", np.array([b"fine"], np.object_)),
                    pb_utils.Tensor("token_ids", np.array([5], np.int32)),
                    pb_utils.Tensor("final", np.array([json.dumps(end).encode()], np.object_)),
                ]),
                flags=final,
            )
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    """A mesh with one small model."""
    with (
        tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as folder,
        running_mesh(Path(folder) / "m", models=False) as mesh,
    ):
        deploy(mesh, "failing", kind="chat", code=CHAT, config=CHAT_CONFIG)
        yield mesh


def ask(content: str) -> inference_pb2.GenerateRequest:
    message = text_message(inference_pb2.ROLE_USER, content)
    return inference_pb2.GenerateRequest(model="failing", messages=[message], max_tokens=2)


async def generate(mesh: RunningMesh, content: str, **claims: Any) -> str:
    async with mesh.channel() as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        events = stub.Generate(ask(content), metadata=mesh.metadata(**claims), timeout=30)
        return "".join([event.delta.text async for event in events])


def post(mesh: RunningMesh, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(  # noqa: S310  # the edge
        f"{mesh.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {mesh.token()}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def tensors(mesh: RunningMesh, content: str, **fields: Any) -> dict[str, Any]:
    """Returns the error of a request of the Open Inference Protocol."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    request = infer_request("failing", "request", [json.dumps(body).encode()], [1])
    request.MergeFrom(service_pb2.ModelInferRequest(**fields))
    async with mesh.channel() as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        async for answer in stub.ModelStreamInfer(iter([request]), metadata=mesh.metadata()):
            if answer.error_message:
                found: dict[str, Any] = json.loads(answer.error_message)
                return found
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("way", WAYS)
async def test_a_models_text_reaches_no_caller(mesh, way):
    """By no API: callers get a constant text with the id of the request."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(mesh, f"fail {way}")
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == ("INTERNAL", "MODEL_FAILED")
    assert error.metadata["request_id"] in error.message
    streamed = await tensors(mesh, f"fail {way}")
    assert streamed["reason"] == "MODEL_FAILED"
    assert streamed["metadata"]["request_id"] in streamed["message"]
    messages = [{"role": "user", "content": f"fail {way}"}]
    answers = [
        await asyncio.to_thread(
            post, mesh, {"model": "failing", "messages": messages, "stream": stream}
        )
        for stream in (False, True)
    ]
    assert all("MODEL_FAILED" in text or "failed on this request" in text for _, text in answers)
    assert answers[0][0] == 500
    every = [str(caught.value), repr(caught.value.trailing_metadata()), str(streamed), str(answers)]
    assert not [text for text in every if CANARY in text or "/srv" in text or "Traceback" in text]


async def test_a_job_fails_at_once_and_does_not_tell_the_models_text(mesh):
    """Another attempt would fail, too."""
    async with mesh.channel() as channel:
        stub: Any = jobs_pb2_grpc.JobServiceStub(channel)
        submit = jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(generate=ask("fail raise")))
        job = (await stub.SubmitJob(submit, metadata=mesh.metadata())).job
        watch = jobs_pb2.WatchJobRequest(name=job.name)
        async for answer in stub.WatchJob(watch, metadata=mesh.metadata(), timeout=30):
            job = answer.job
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert "failed on this request" in job.error.message
    assert CANARY not in str(job)


async def test_a_tenant_whose_requests_fail_refuses_the_model_to_nobody(mesh):
    """However many it sends: another tenant's next request is answered."""
    for _ in range(5):
        sent = [generate(mesh, f"fail {way}", tenant="attacker") for way in WAYS for _ in range(4)]
        results = await asyncio.gather(*sent, return_exceptions=True)
        assert all(isinstance(result, grpc.aio.AioRpcError) for result in results)
        assert await generate(mesh, "hello", tenant="victim") == "fine"


@pytest.mark.parametrize("name", ["text", "final"])
async def test_classes_of_strings_do_not_end_triton(mesh, name):
    """They end tritonserver 2.51: the request does not reach it."""
    triton = mesh.pid("triton-0")
    altered = {"name": name, "parameters": {"classification": {"int64_param": 1}}}
    error = await tensors(mesh, "hello", outputs=[altered])
    assert error["reason"] == "INVALID_FIELD"
    assert await generate(mesh, "hello") == "fine"
    assert mesh.pid("triton-0") == triton


def test_the_log_says_where_the_model_failed_and_not_its_text(mesh):
    """The class of the exception and the line of code."""
    logs = "".join(
        path.read_text() for path in (mesh.layout.home / "logs").iterdir() if path.is_file()
    )
    assert "the model raised ValueError" in logs
    assert "model.py(" in logs
    assert CANARY not in logs
