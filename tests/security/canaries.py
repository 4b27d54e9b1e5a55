"""Plants words that nobody should see again, on every way into a mesh."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
from aiohttp import web
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from libs.chat.wire import text_message
from tests.bench.mesh import deploy_provider
from tests.support.mesh import RunningMesh
from tests.support.models import CHAT_CONFIG, deploy
from tests.support.provider import MODES, MockProvider, write_key

PROVIDER_MODEL = "canary-provider"
RAISING_MODEL = "canary-raises"
JOB_SECONDS = 60

# Answers the readiness check, and raises an exception that quotes every other request.
_MODEL_CODE = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            raw = pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0]
            if json.loads(raw).get("operation") != "count_tokens":
                raise ValueError(f"cannot handle {raw!r}")
            values = {"text": [b""], "final": [json.dumps({"prompt_tokens": 1}).encode()]}
            tensors = [pb_utils.Tensor(k, np.array(v, np.object_)) for k, v in values.items()]
            tensors.insert(1, pb_utils.Tensor("token_ids", np.array([], np.int32)))
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            request.get_response_sender().send(pb_utils.InferenceResponse(tensors), flags=flags)
"""


def _word(kind: str) -> str:
    return f"canary{kind}{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Canaries:
    """The words, by where they are planted."""

    prompt: str = field(default_factory=lambda: _word("prompt"))
    completion: str = field(default_factory=lambda: _word("completion"))
    text: str = field(default_factory=lambda: _word("text"))
    tensor: str = field(default_factory=lambda: _word("tensor"))
    job: str = field(default_factory=lambda: _word("job"))
    api_key: str = field(default_factory=lambda: _word("key"))
    token: str = field(default_factory=lambda: _word("token"))
    malformed: str = field(default_factory=lambda: _word("malformed"))
    query: str = field(default_factory=lambda: _word("query"))
    header: str = field(default_factory=lambda: _word("header"))
    provider: str = field(default_factory=lambda: _word("provider"))


class Planter:
    """Makes the calls of a tenant; all of them end, with whatever status."""

    def __init__(self, mesh: RunningMesh, words: Canaries, provider: MockProvider) -> None:
        self.mesh = mesh
        self.words = words
        self.provider = provider
        self.token = mesh.token(tenant="planter", user="pat", scopes="infer read")
        self.answers: list[str] = []
        self.statuses: dict[str, str] = {}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"), ("x-canary", self.words.header))

    def deploy(self) -> None:
        """Deploys a provider, whose key is a canary, and a model that raises."""
        url = self.provider.base_url
        write_key(self.mesh.layout.home / "secrets", "canary", self.words.api_key, url_prefix=url)
        deploy_provider(self.mesh, PROVIDER_MODEL, url, api_key_name="canary")
        deploy(self.mesh, RAISING_MODEL, kind="chat", code=_MODEL_CODE, config=CHAT_CONFIG)

    async def plant(self) -> None:
        """Plants all canaries."""
        async with aiohttp.ClientSession() as http, self.mesh.channel() as channel:
            await self._chats(http, channel)
            await self._embeddings(http, channel)
            await self._tensors(channel)
            await self._jobs(channel)
            await self._malformed(http, channel)
            await self._tokens(http)

    async def _chats(self, http: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        words = self.words
        for model, prompt in (
            ("smollm2", words.prompt),
            ("smollm2", words.prompt * 3000),  # too long
            (RAISING_MODEL, words.prompt),
            ("nobody", words.prompt),
        ):
            await self._chat(http, channel, model, prompt)
        for mode in (echo, refuse(400), refuse(401), refuse(422), refuse(429), refuse(500), page):
            MODES["canary"], self.provider.mode = mode, "canary"
            await self._chat(http, channel, PROVIDER_MODEL, words.prompt)
        MODES["canary"] = echo

    async def _chat(
        self, http: aiohttp.ClientSession, channel: grpc.aio.Channel, model: str, prompt: str
    ) -> None:
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": prompt}]
        for stream in (False, True):
            body = {"model": model, "messages": messages, "max_tokens": 4, "stream": stream}
            await self._post(http, "/v1/chat/completions", json.dumps(body))
        request = inference_pb2.GenerateRequest(
            model=model, max_tokens=4, messages=[text_message(inference_pb2.ROLE_USER, prompt)]
        )
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await self._rpc(f"Generate {model}", stub.Generate, request)
        count = inference_pb2.CountTokensRequest(model=model, messages=request.messages)
        await self._rpc(f"CountTokens {model}", stub.CountTokens, count)

    async def _embeddings(self, http: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        text = self.words.text
        body = {"model": "minilm", "input": [text, f"{text} again"]}
        await self._post(http, "/v1/embeddings", json.dumps(body))
        await self._post(http, "/v1/embeddings", json.dumps(body | {"dimensions": text}))
        await self._post(http, "/v1/embeddings", json.dumps(body | {"model": "nobody"}))
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        for texts in ([text], [text, ""], [f"{text} " * 200_000]):
            request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)
            await self._rpc("Embed", stub.Embed, request)

    async def _tensors(self, channel: grpc.aio.Channel) -> None:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        data = self.words.tensor.encode()
        raw = len(data).to_bytes(4, "little") + data
        for model, name, shape, kind in (
            ("minilm", "text", [1, 1], "BYTES"),
            ("minilm", "text", [2, 1], "BYTES"),
            ("minilm", "text", [1, 1], "FP32"),
            ("minilm", "no-such-tensor", [1, 1], "BYTES"),  # names may be in errors and traces
            ("smollm2", "request", [1], "BYTES"),  # not JSON
            (RAISING_MODEL, "request", [1], "BYTES"),
        ):
            request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw])
            request.inputs.add(name=name, datatype=kind, shape=shape)
            request.parameters["canary"].string_param = self.words.tensor
            await self._rpc(f"ModelInfer {model}", stub.ModelInfer, request)
            await self._rpc(f"ModelStreamInfer {model}", stub.ModelStreamInfer, _once(request))

    async def _jobs(self, channel: grpc.aio.Channel) -> None:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        names = []
        for model in ("smollm2", PROVIDER_MODEL, "nobody"):
            message = text_message(inference_pb2.ROLE_USER, self.words.job)
            work = inference_pb2.GenerateRequest(model=model, max_tokens=4, messages=[message])
            job = await stub.SubmitJob(
                jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(generate=work)),
                metadata=self.metadata,
            )
            names.append(job.job.name)
        texts = embedding_pb2.EmbedRequest(model="minilm", texts=[self.words.job])
        job = await stub.SubmitJob(
            jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(embed=texts)),
            metadata=self.metadata,
        )
        names.append(job.job.name)
        for name in names:
            async with asyncio.timeout(JOB_SECONDS):
                async for change in stub.WatchJob(
                    jobs_pb2.WatchJobRequest(name=name), metadata=self.metadata
                ):
                    self.answers.append(str(change))
        wrong = inference_pb2.GenerateRequest(
            model="smollm2", temperature=99, stop=[self.words.job] * 50
        )
        request = jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(generate=wrong))
        await self._rpc("SubmitJob", stub.SubmitJob, request)

    async def _malformed(self, http: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        word = self.words.malformed
        paths = (
            "/v1/chat/completions",
            "/v1/embeddings",
            "/headrace.inference.v1.InferenceService/Generate",
            "/headrace.inference.v1.InferenceService/CountTokens",
            "/headrace.embedding.v1.EmbeddingService/Embed",
            "/headrace.jobs.v1.JobService/SubmitJob",
            "/headrace.cost.v1.CostService/QueryUsage",
        )
        bodies = (
            f'{{"model": "smollm2", "messages": [{{"role": "user", "content": "{word}',
            f"{word}",
            f'{{"model": {word}}}',
            f'{{"{word}": "{word}"}}',
            f'{{"model": "smollm2", "max_tokens": "{word}", "messages": "{word}"}}',
            f'{{"model": ["{word}"], "input": {{"{word}": 1}}, "texts": "{word}"}}',
            f'{{"filter": "{word} = 1", "payload": {{"generate": "{word}"}}}}',
            f'{{"messages": [{{"role": "{word}", "content": [{{"{word}": 1}}]}}]}}',
        )
        for path in paths:
            for body in bodies:
                await self._post(http, path, body)
        for path in paths[2:]:
            call = channel.unary_unary(path, bytes, bytes)
            await self._rpc(path, call, b"\xff\xff" + word.encode())

    async def _tokens(self, http: aiohttp.ClientSession) -> None:
        head, payload, _ = self.token.split(".")
        forged = f"{head}.{payload}.{self.words.token}"
        for value in (
            f"Bearer {forged}",
            f"Bearer {self.words.token}",
            f"Basic {self.words.token}",
        ):
            await self._post(http, "/v1/chat/completions", "{}", token=value)
        await self._post(http, f"/v1/models?access_token={forged}", "{}", token="")
        await self._post(http, "/v1/chat/completions", "{}", query=f"access_token={forged}")

    async def _post(
        self,
        http: aiohttp.ClientSession,
        path: str,
        body: str,
        *,
        token: str | None = None,
        query: str = "",
    ) -> None:
        word = self.words.header
        headers = {
            "authorization": f"Bearer {self.token}" if token is None else token,
            "content-type": "application/json",
            "x-canary": word,
            "cookie": f"session={word}",
            "baggage": f"canary={word}",
            "x-headrace-user": word,
            "idempotency-key": word,
        }
        mark = "&" if "?" in path else "?"
        url = f"{self.mesh.url}{path}{mark}canary={self.words.query}&{query}"
        async with http.post(url, data=body, headers=headers) as response:
            text = await response.text(errors="replace")
        self.answers.append(text)
        self.statuses[f"{path} {body[:20]}"] = str(response.status)

    async def _rpc(self, name: str, method: Callable[..., Any], request: Any) -> None:
        call = method(request, metadata=self.metadata)
        try:
            if isinstance(call, AsyncIterable):
                self.answers += [str(message) async for message in call]
            else:
                self.answers.append(str(await call))
            self.statuses[name] = "OK"
        except grpc.aio.AioRpcError as error:
            self.answers.append(f"{error.details()} {error.trailing_metadata()}")
            self.statuses[name] = error.code().name


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request


async def echo(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    """Answers with the canary of completions."""
    word = f"{WORDS[provider.base_url].completion} "
    if not provider.requests[-1].get("stream"):
        message = {"role": "assistant", "content": word}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": provider.usage})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"".join(provider.events((word, word))))
    return response


def refuse(status: int) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Refuses with a message that quotes the key and the prompt, and has a canary of its own."""

    async def answer(provider: MockProvider, request: web.Request) -> web.StreamResponse:
        word = WORDS[provider.base_url].provider
        quoted = f"{word} {request.headers.get('authorization')} {provider.requests[-1]}"
        return provider.refuse(status, quoted, word)

    return answer


async def page(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    """Answers something else than an answer."""
    return web.Response(text=f"<html>{WORDS[provider.base_url].provider}</html>")


# The words of each provider, by its URL.
WORDS: dict[str, Canaries] = {}
