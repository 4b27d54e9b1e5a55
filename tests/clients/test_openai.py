"""The unmodified `openai` client for Python."""

from __future__ import annotations

from datetime import datetime, timedelta

import openai
import pytest

from libs.clock import SystemClock
from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
async def client(mesh: RunningMesh):
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token()) as client:
        yield client


async def test_streamed_and_whole_answers_are_the_same(client):
    """One path, two ways to take it; the usage is told either way."""
    whole = await client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=12)
    parts, usage = [], None
    stream = await client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=12, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
        usage = chunk.usage or usage
    assert len(parts) > 3
    assert "".join(parts) == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


async def test_models_and_embeddings(client):
    """The list has both models; vectors come in either encoding, the same."""
    assert [model.id async for model in client.models.list()] == ["minilm", "smollm2"]
    default = await client.embeddings.create(model="minilm", input="a river")
    floats = await client.embeddings.create(
        model="minilm", input="a river", encoding_format="float"
    )
    assert default.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": "nope"}, 404),
        ({"messages": []}, 400),
        ({"max_tokens": 0}, 400),
        ({"max_tokens": 100_000}, 400),
        ({"logprobs": True}, 400),
        ({"n": 2}, 400),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
    ],
)
async def test_errors_are_the_clients_own(client, wrong, status):
    """Each is the exception that the client has for it, with a code and a message."""
    asked = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 4, **wrong}
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(**asked)
    assert caught.value.status_code == status
    assert caught.value.code
    assert caught.value.message


class _Yesterday(SystemClock):
    def now(self) -> datetime:
        return super().now() - timedelta(days=1)


async def test_a_token_that_is_none_is_an_authentication_error(mesh: RunningMesh):
    """Expired or forged, it is the same to the client."""
    for key in ("forged", mesh.token(ttl_seconds=60, clock=_Yesterday())):
        async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key=key) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
