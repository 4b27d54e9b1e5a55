"""A provider runs a version of a model: it is deployed, called through the edge and billed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import openai
import pytest
from headrace.common.v1.model_pb2 import BACKEND_STATE_READY
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.chat.wire import text_message
from libs.rpc.status import from_rpc_error
from tests.bench.mesh import deploy
from tests.support.mesh import RunningMesh
from tests.support.provider import TEXT, WORDS, MockProvider, mock_provider, write_key

pytestmark = pytest.mark.integration

KEY = "sk-of-the-walk"
ROUTE_SECONDS = 10.0
INPUT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = 11, 4, 9
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def provider() -> AsyncIterator[MockProvider]:
    async with mock_provider() as provider:
        yield provider


@pytest.fixture
async def model(mesh: RunningMesh, provider: MockProvider, tmp_path: Path) -> str:
    """Deploys a version that the provider runs, and returns the model's name."""
    port = provider.base_url.split(":")[2].split("/")[0]
    name = f"walk-{port}"
    await deploy_version(mesh, name, "1.0.0", provider, tmp_path)
    return name


async def deploy_version(
    mesh: RunningMesh, model: str, version: str, provider: MockProvider, folder: Path
) -> None:
    key_name = f"{model}-{version}"
    write_key(mesh.layout.home / "secrets", key_name, KEY, url_prefix=provider.base_url)
    manifest = {
        "kind": "chat",
        "engine": "openai",
        "context_tokens": 4096,
        "max_output_tokens": 512,
        "provider": {
            "base_url": provider.base_url,
            "model": "upstream-model",
            "api_key_name": key_name,
        },
    }
    (folder / "headrace.json").write_text(json.dumps(manifest))
    files = {"headrace.json": folder / "headrace.json"}
    await asyncio.to_thread(deploy, mesh, model, files, version=version)
    # The router has it; `inference` gets it with the next snapshot.
    headers = {"authorization": f"Bearer {mesh.token()}"}
    async with asyncio.timeout(ROUTE_SECONDS), aiohttp.ClientSession(mesh.url) as http:
        while True:
            async with http.get(f"/v1/models/{model}@{version}", headers=headers) as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)


@pytest.fixture
async def client(mesh: RunningMesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{mesh.url}/v1", api_key=mesh.token(), max_retries=0
    ) as client:
        yield client


async def test_a_provider_answers_as_a_version_of_a_model(mesh, model, provider, client):
    """Streamed and in one piece, with the provider's tokens and the mesh's price and version."""
    stream = await client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == TEXT
    assert chunks[-1].usage.completion_tokens == OUTPUT_TOKENS

    whole = await client.chat.completions.create(model=model, messages=MESSAGES)
    assert whole.choices[0].message.content == TEXT
    assert whole.usage.prompt_tokens == INPUT_TOKENS
    assert whole.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS
    served = whole.model_extra["headrace"]
    assert served["model_version"] == f"models/{model}/versions/1.0.0"
    assert served["artifact_digest"].startswith("sha256:")
    assert served["cost_nano_usd"] > 0

    assert [request["model"] for request in provider.requests] == ["upstream-model"] * 2
    assert {headers["Authorization"] for headers in provider.headers} == {f"Bearer {KEY}"}


async def test_no_agent_loads_a_version_of_a_provider(mesh, model):
    """The registry itself reports it as ready."""
    async with mesh.channel() as channel:
        registry = registry_pb2_grpc.RegistryServiceStub(channel)
        answer = await registry.GetDeployment(
            registry_pb2.GetDeploymentRequest(name=f"deployments/{model}-1-0-0"),
            metadata=mesh.metadata(),
        )
    assert answer.deployment.status.state == registry_pb2.DEPLOYMENT_STATE_READY
    (backend,) = answer.deployment.status.backends
    assert (backend.id, backend.state) == ("provider", BACKEND_STATE_READY)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("429", (429, "backend_rate_limited")),
        ("401", (400, "backend_misconfigured")),
        ("400", (400, "invalid_field")),
        ("500", (503, "backend_failed")),
    ],
)
async def test_an_error_of_the_provider_reaches_the_client(mesh, model, provider, mode, expected):
    """With the status and the code that OpenAI's clients handle, and without the key."""
    provider.mode, provider.retry_after = mode, "3" if mode == "429" else ""
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{mesh.url}/v1/chat/completions",
            json={"model": model, "messages": MESSAGES},
            headers={"authorization": f"Bearer {mesh.token()}"},
        ) as response,
    ):
        body = await response.text()
        assert (response.status, json.loads(body)["error"]["code"]) == expected
        assert KEY not in body
        if mode == "429":
            assert 1 <= int(response.headers["retry-after"]) <= 3


async def test_an_older_version_answers_if_the_newest_one_fails_at_once(
    mesh, model, provider, client, tmp_path
):
    """The answer says which version it was and why; a request for the newest one fails."""
    async with mock_provider("500") as failing:
        await deploy_version(mesh, model, "2.0.0", failing, tmp_path)
        for stream in (False, True):
            answer = await client.chat.completions.create(
                model=model, messages=MESSAGES, stream=stream
            )
            last = [chunk async for chunk in answer][-1] if stream else answer
            served = last.model_extra["headrace"]
            assert served["model_version"] == f"models/{model}/versions/1.0.0"
            assert served["route_reason"] == (
                f"fallback: the backends of models/{model}/versions/2.0.0 failed"
            )
        assert (len(failing.requests), len(provider.requests)) == (2, 2)
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=f"{model}@2.0.0", messages=MESSAGES)
    assert len(provider.requests) == 2


async def test_an_interrupted_stream_ends_with_an_error(mesh, model, provider, client):
    """The client keeps what came, and sees that it is incomplete."""
    provider.mode = "cut_mid"
    got = []
    stream = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)

    async def read() -> None:
        async for chunk in stream:
            got.append(chunk.choices[0].delta.content or "")  # noqa: PERF401  # kept at an error

    with pytest.raises(openai.APIError):
        await read()
    assert "".join(got) == "".join(WORDS[:2])


async def test_an_interrupted_stream_has_a_reason_in_grpc(mesh, model, provider):
    """The one of a failed backend."""
    provider.mode = "cut_mid"
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(
            inference_pb2.GenerateRequest(
                model=model, messages=[text_message(inference_pb2.ROLE_USER, "hello")]
            ),
            metadata=mesh.metadata(),
        )
        text = ""
        while text != "".join(WORDS[:2]):
            text += (await call.read()).delta.text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(caught.value).reason == "BACKEND_FAILED"
