"""A stock `tritonclient` calls the edge: real Envoy, Triton and models."""

from __future__ import annotations

import asyncio
import json
import queue
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.rpc import error_details_pb2, status_pb2
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from deploy.envoy.routes import OPEN_INFERENCE, OPEN_INFERENCE_HEALTH, OPEN_INFERENCE_METHODS
from deploy.triton.artifact import bundled_version
from libs.chat.wire import text_message
from libs.rpc.status import DETAILS_KEY
from services.inference.api.oip import OpenInferenceServicer, handlers, stream_handlers
from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.integration

LEDGER_SECONDS = 15.0


@pytest.fixture
def headers(mesh: RunningMesh) -> dict[str, str]:
    return {"authorization": f"Bearer {mesh.token()}"}


@pytest.fixture
async def client(mesh: RunningMesh) -> AsyncIterator[triton_aio.InferenceServerClient]:
    async with triton_aio.InferenceServerClient(mesh.address) as client:
        yield client


def texts(*values: str) -> triton.InferInput:
    return _input("text", np.array([[value.encode()] for value in values], np.object_))


def conversation(question: str, *, max_tokens: int) -> triton.InferInput:
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"messages": messages, "max_tokens": max_tokens})
    return _input("request", np.array([body.encode()], np.object_))


async def test_health_and_metadata_are_those_of_the_mesh(client, headers) -> None:
    """Public names and semantic versions; health needs no token, because probes have none."""
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("minilm", headers=headers)
    assert await client.is_model_ready("minilm", "1.0.0", headers=headers)
    assert not await client.is_model_ready("nobody", headers=headers)
    assert (await client.get_server_metadata(headers=headers)).name == "headrace"
    metadata = await client.get_model_metadata("minilm", headers=headers)
    assert (metadata.name, list(metadata.versions)) == ("minilm", ["1.0.0"])
    assert [tensor.name for tensor in metadata.outputs] == ["embedding", "token_count"]
    config = await client.get_model_config("smollm2", headers=headers)
    assert config.config.name == "smollm2"
    assert config.config.model_transaction_policy.decoupled


def test_embeddings_are_tensors_and_are_billed(mesh: RunningMesh, headers) -> None:
    """With the synchronous client; the ledger has the id of the request."""
    request_id = str(uuid.uuid4())
    client = triton.InferenceServerClient(mesh.address)
    result = client.infer(
        "minilm",
        [texts("a mill", "a mill", "the moon")],
        model_version="1.0.0",
        request_id=request_id,
        headers=headers,
    )
    client.close()
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == (
        "minilm",
        "1.0.0",
        request_id,
    )
    vectors = result.as_numpy("embedding")
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[2] < 0.9
    cost = asyncio.run(_cost(mesh, request_id))
    assert [posting.quantity for posting in cost.postings] == [
        int(result.as_numpy("token_count").sum())
    ]


async def test_many_requests_stream_at_once_over_one_stream(client, mesh, headers) -> None:
    """Answers are identified by id; a failed request ends no other one."""
    ids = [str(uuid.uuid4()) for _ in range(3)]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, request_id in enumerate(ids):
            inputs = [conversation(f"Count to {index}", max_tokens=5)]
            yield {"model_name": "smollm2", "inputs": inputs, "request_id": request_id}
        yield {"model_name": "nobody", "inputs": [texts("x")], "request_id": "lost"}
        yield {"model_name": "minilm", "inputs": [texts("x")], "request_id": "vector"}

    finals: dict[str, dict[str, Any]] = {}
    tokens: dict[str, int] = {}
    errors = []
    async for result, error in client.stream_infer(requests(), headers=headers):
        if error is not None:
            errors.append(json.loads(error.message()))
            continue
        response = result.get_response()
        if response.id == "vector":
            assert (response.model_name, response.model_version) == ("minilm", "1.0.0")
            continue
        assert (response.model_name, response.model_version) == (
            "smollm2",
            bundled_version("smollm2"),
        )
        tokens[response.id] = tokens.get(response.id, 0) + result.as_numpy("token_ids").size
        if final := result.as_numpy("final")[0]:
            finals[response.id] = json.loads(final)
    assert [error["reason"] for error in errors] == ["MODEL_NOT_FOUND"]
    assert set(finals) == set(ids)
    for request_id, final in finals.items():
        assert tokens[request_id] == final["completion_tokens"] == 5
        cost = await _cost(mesh, request_id)
        output = _completion_tokens(cost)
        assert output == [5]


def test_the_synchronous_client_streams(mesh: RunningMesh, headers) -> None:
    """With a callback in a thread of its own."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = triton.InferenceServerClient(mesh.address)
    client.start_stream(lambda result, error: results.put((result, error)), headers=headers)
    inputs = [conversation("Say hello", max_tokens=4)]
    client.async_stream_infer("smollm2", inputs, enable_empty_final_response=True)
    text, is_final = b"", False
    while not is_final:
        result, error = results.get(timeout=60)
        assert error is None
        text += result.as_numpy("text")[0]
        is_final = result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    client.close()
    assert text


async def test_failures_have_a_status_and_error_info(mesh: RunningMesh) -> None:
    """Token, model, version and inputs have different ones."""

    async def status(model: str, tensor: Any, *, version: str = "", token: bool = True) -> Any:
        request = service_pb2.ModelInferRequest(
            model_name=model,
            model_version=version,
            inputs=[tensor._get_tensor()],
            raw_input_contents=[tensor._get_content()],
        )
        async with mesh.channel() as channel:  # tritonclient hides the details of a status
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request, metadata=mesh.metadata() if token else ())
        found: Any = caught.value.trailing_metadata()
        trailers = dict(found)
        info = error_details_pb2.ErrorInfo()
        assert status_pb2.Status.FromString(trailers[DETAILS_KEY]).details[0].Unpack(info)
        assert info.domain == "headrace"
        return caught.value.code().name, info.reason

    chat = conversation("hello", max_tokens=2)
    assert await status("nobody", texts("x")) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert await status("minilm", texts("x"), version="7.0.0") == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert await status("minilm", chat) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert await status("smollm2", chat) == ("INVALID_ARGUMENT", "MODEL_KIND_MISMATCH")
    assert await status("minilm", texts("x"), token=False) == ("UNAUTHENTICATED", "TOKEN_INVALID")
    # Larger than the limit of all other requests, and than the model can take.
    assert await status("smollm2", texts("x" * 9_000_000)) == (
        "INVALID_ARGUMENT",
        "MESSAGE_TOO_LARGE",
    )


async def test_a_cancelled_stream_stops_the_generation(client, mesh, headers) -> None:
    """The engine stops: far fewer tokens than requested are billed."""
    request_id = str(uuid.uuid4())

    async def requests() -> AsyncIterator[dict[str, Any]]:
        inputs = [conversation("Tell a very long story", max_tokens=900)]
        yield {"model_name": "smollm2", "inputs": inputs, "request_id": request_id}

    stream = client.stream_infer(requests(), headers=headers)
    received = 0

    async def read_some() -> None:
        nonlocal received
        async for _ in stream:
            received += 1
            if received == 3:
                stream.cancel()

    with pytest.raises((InferenceServerException, asyncio.CancelledError)):
        await read_some()
    cost = await _cost(mesh, request_id)
    (output,) = _completion_tokens(cost)
    assert 3 <= output < 100


async def test_count_tokens_agrees_with_generate(mesh: RunningMesh) -> None:
    """On the number and on the version."""
    messages = [text_message(inference_pb2.ROLE_USER, "How deep is a headrace?")]
    async with mesh.channel() as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        counted = await stub.CountTokens(
            inference_pb2.CountTokensRequest(model="smollm2", messages=messages),
            metadata=mesh.metadata(),
        )
        generated = [
            message.final
            async for message in stub.Generate(
                inference_pb2.GenerateRequest(model="smollm2", messages=messages, max_tokens=1),
                metadata=mesh.metadata(),
            )
        ][-1]
    assert counted.prompt_tokens == generated.usage.prompt_tokens > 0
    assert counted.model_version == generated.model_version
    assert counted.artifact_digest == generated.artifact_digest


def test_the_edge_routes_the_methods_of_the_service() -> None:
    """None is missing on either side."""
    servicer = OpenInferenceServicer(None, None, clock=None)  # type: ignore[arg-type]  # not called
    served: list[Any] = [handlers(servicer), stream_handlers(servicer)]
    answered = {name for service in served for name in service._method_handlers}
    routed = {f"/{OPEN_INFERENCE}/{method}" for method in OPEN_INFERENCE_METHODS}
    assert answered == routed | set(OPEN_INFERENCE_HEALTH)


def _completion_tokens(cost: cost_pb2.GetRequestCostResponse) -> list[int]:
    """Returns the quantities of generated tokens that were charged."""
    kind = usage_pb2.USAGE_KIND_COMPLETION_TOKENS
    return [posting.quantity for posting in cost.postings if posting.usage_kind == kind]


async def _cost(mesh: RunningMesh, request_id: str) -> cost_pb2.GetRequestCostResponse:
    """Waits until a request is in the ledger."""
    async with mesh.channel() as channel, asyncio.timeout(LEDGER_SECONDS):
        stub: cost_pb2_grpc.CostServiceAsyncStub = cost_pb2_grpc.CostServiceStub(channel)
        while True:
            try:
                return await stub.GetRequestCost(
                    cost_pb2.GetRequestCostRequest(request_id=request_id), metadata=mesh.metadata()
                )
            except Exception as error:
                if "NOT_FOUND" not in str(error):
                    raise
                await asyncio.sleep(0.1)


def _input(name: str, values: Any) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values)
    return tensor
