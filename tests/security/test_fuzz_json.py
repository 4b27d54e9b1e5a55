"""Ten thousand changed JSON bodies for OpenAI's paths and transcoded methods, through the edge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import aiohttp
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from libs.openai.bodies import CHAT_COMPLETIONS_PATH, EMBEDDINGS_PATH
from libs.rpc.public_api import public_services
from tests.fuzz.corpus import EXAMPLES, TOKENS
from tests.fuzz.mutate import Mutator
from tests.support.fuzzing import (
    ALL_SCOPES,
    Slowest,
    heartbeat,
    in_parallel,
    unharmed,
)
from tests.support.mesh import RunningMesh
from tests.support.random_messages import random_message

pytestmark = [pytest.mark.integration, pytest.mark.storm]

BODIES = 10_000
SEED = "json"
WIDTH = 16
_OPENAI = {
    CHAT_COMPLETIONS_PATH: EXAMPLES["chat_body"],
    EMBEDDINGS_PATH: EXAMPLES["embedding_body"],
}
_CALL_SECONDS = 5.0
# What callers' mistakes, and a mesh without models, may lead to.
_EXPECTED = frozenset({200, 400, 403, 404, 408, 409, 413, 415, 429, 501, 504})


class Request(NamedTuple):
    """A request that the test sends."""

    path: str
    body: bytes


def requests() -> Iterator[Request]:
    """Yields the requests of the test; the same ones each time."""
    mutator = Mutator(SEED, TOKENS["chat_body"])
    source = mutator.random
    unary = [
        (f"/{service.full_name}/{method.name}", method.input_type)
        for service in public_services()
        for method in service.methods
        if not method.client_streaming and not method.name.startswith("Watch")
    ]
    for number in range(BODIES):
        if number % 2:
            path, examples = source.choice(list(_OPENAI.items()))
        else:
            path, kind = unary[number // 2 % len(unary)]
            examples = [_json(random_message(source, kind))]
        body = mutator.mutated(examples) if source.random() < 0.9 else source.choice(examples)
        yield Request(path, body)


def _json(message: Message) -> bytes:
    try:
        return json_format.MessageToJson(message).encode()
    except (json_format.SerializeToJsonError, ValueError):  # a time that has no text
        return b'{"page_size": 1, "name": "a"}'


class Caller:
    """Posts to the edge."""

    def __init__(self, mesh: RunningMesh, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._headers = {
            "authorization": f"Bearer {mesh.token(scopes=ALL_SCOPES)}",
            "content-type": "application/json",
            "grpc-timeout": "3S",
        }
        self.slowest = Slowest[Request]()
        self.statuses: dict[int, int] = {}

    async def send(self, request: Request) -> None:
        """Sends a request, and checks the response."""
        began = time.perf_counter()
        async with self._http.post(
            request.path, data=request.body, headers=self._headers
        ) as response:
            text = await response.read()
        self.slowest.add(time.perf_counter() - began, request)
        self.statuses[response.status] = self.statuses.get(response.status, 0) + 1
        assert response.status in _EXPECTED, (response.status, request, text)

    async def beat(self) -> None:
        """Sends a request that succeeds."""
        async with self._http.get("/v1/models", headers=self._headers) as response:
            assert response.status == 200


async def test_no_body_is_answered_with_a_fault(bare_mesh):
    """No 500, no stall, no restart."""
    with unharmed(bare_mesh):
        timeout = aiohttp.ClientTimeout(_CALL_SECONDS)
        async with aiohttp.ClientSession(bare_mesh.url, timeout=timeout) as http:
            caller = Caller(bare_mesh, http)
            async with heartbeat(caller.beat):
                await in_parallel(requests(), caller.send, width=WIDTH)
            await caller.slowest.check(caller.send)
    print(caller.statuses)
    assert caller.statuses[400] > BODIES / 10
