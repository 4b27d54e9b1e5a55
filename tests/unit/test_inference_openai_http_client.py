"""A provider as a backend, tested with a real HTTP server that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from libs.chat.request import GenerationRequest, Message
from libs.chat.resume import token_prefix
from libs.clock import SystemClock
from libs.errors import (
    FailedPrecondition,
    HeadraceError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.inference import metrics
from services.inference.backends.openai_http import client as provider_module
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.client import MAX_CONNECTIONS, Provider
from services.inference.backends.openai_http.errors import (
    MAX_ATTEMPTS,
    MAX_RETRY_AFTER_SECONDS,
    MAX_TEXT_LENGTH,
    read_error,
    retry_after_seconds,
)
from services.inference.backends.stall import StallLimits
from services.inference.domain import BackendFailedError, ChatCall, Delivered, Finish
from services.inference.generation.relay import Relay
from tests.support.provider import TEXT, WORDS, MockProvider, mock_provider, write_key

CALL = ChatCall(
    request_id="r",
    request=GenerationRequest(
        model="m", messages=(Message("user", "hello"),), seed=3, stop=("END",), top_p=0.5
    ),
)
STALL = StallLimits(first_token_seconds=0.4, between_tokens_seconds=0.3)
KEY = "sk-a-key-that-nobody-may-see"
KEY_NAME = "example"
TOKEN = token_prefix(CALL.request.fingerprint(), "1.0.0") + "2"


@dataclass
class Got:
    text: str = ""
    chunks: int = 0
    delivered: Delivered = field(default_factory=Delivered)
    ending: Finish | None = None


@asynccontextmanager
async def client_of(
    mock: MockProvider, tmp_path: Path, *, stall: StallLimits = STALL
) -> AsyncIterator[Provider]:
    write_key(tmp_path, KEY_NAME, KEY, url_prefix=mock.base_url)
    client = Provider(
        mock.base_url,
        api_key_name=KEY_NAME,
        keys=ApiKeys(tmp_path, clock=SystemClock()),
        stall=stall,
        clock=SystemClock(),
    )
    try:
        yield client
    finally:
        await client.close()


async def ask(client: Provider, *, call: ChatCall = CALL, got: Got | None = None) -> Got:
    got = got or Got()
    relay = Relay()

    async def read() -> None:
        while (chunk := await relay.take()) is not None:
            got.text += chunk.text
            got.chunks += 1

    reader = asyncio.create_task(read())
    try:
        got.ending = await client.generate(
            "upstream-model", call, max_tokens=20, delivered=got.delivered, relay=relay
        )
    finally:
        relay.close()
        await reader
    return got


def client_error(error: BackendFailedError, reason: str) -> HeadraceError:
    """Returns the error for the caller, which must have this reason."""
    returned = error.client_error.to_error(["b0"])
    assert (returned.reason, returned.metadata) == (reason, {"backend": "b0"})
    return returned


@pytest.mark.parametrize("mode", ["ok", "split", "slow", "whole"])
async def test_every_form_of_an_answer_is_read(mode, tmp_path):
    """At once, a few bytes at a time, slowly, or as one object: text and usage are the same."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        got = await ask(client)
    assert got.text == TEXT
    assert got.ending == Finish("stop", 11, 9, 4)
    assert got.delivered.token_count == 9
    assert mock.requests == [
        {
            "model": "upstream-model",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 20,
            "temperature": 0.0,
            "top_p": 0.5,
            "seed": 3,
            "stop": ["END"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert mock.headers[0]["Authorization"] == f"Bearer {KEY}"


async def test_an_unstreamed_answer_is_not_streamed_by_the_provider(tmp_path):
    """The caller would not see the events."""
    async with mock_provider() as mock, client_of(mock, tmp_path) as client:
        got = await ask(client, call=replace(CALL, streamed=False))
    assert got.text == TEXT
    assert got.ending == Finish("stop", 11, 9, 4)
    assert "stream" not in mock.requests[0]


async def test_events_of_one_read_become_one_chunk(tmp_path):
    """What arrives together is delivered together, in one message."""
    async with mock_provider() as mock, client_of(mock, tmp_path) as client:
        assert (await ask(client)).chunks <= 2


async def test_without_usage_chunks_are_counted(tmp_path):
    """The answer is billed by its chunks, and counted in a metric."""
    counter = metrics.PROVIDER_ANSWERS_WITHOUT_USAGE.labels("127.0.0.1")
    before = counter._value.get()
    async with mock_provider() as mock, client_of(mock, tmp_path) as client:
        mock.usage = None
        got = await ask(client)
    assert got.ending == Finish("stop", 0, len(WORDS), 0)
    assert counter._value.get() == before + 1


@pytest.mark.parametrize(
    "mode",
    [
        "500",
        "cut_first",
        "garbage",
        "not_http",
        "error_event",
        "page",
        "stall_first",
        "stall_mute",
        "429",
        "401",
        "404",
        "redirect",
    ],
)
async def test_another_backend_may_answer_after_a_failure_before_the_first_token(mode, tmp_path):
    """Whatever the failure is: nothing was delivered."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        got = Got()
        with pytest.raises(BackendFailedError) as caught:
            await ask(client, got=got)
    assert caught.value.resumable
    assert got.text == ""
    assert KEY not in f"{caught.value} {caught.value.client_error}"


@pytest.mark.parametrize("mode", ["cut_mid", "stall_mid", "short"])
async def test_a_failure_in_the_middle_of_a_stream_ends_the_answer(mode, tmp_path):
    """Without token ids no backend can continue it exactly: the caller gets the error."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        got = Got()
        with pytest.raises(BackendFailedError) as caught:
            await ask(client, got=got)
    assert not caught.value.resumable
    assert isinstance(client_error(caught.value, "BACKEND_FAILED"), Unavailable)
    assert got.text == "".join(WORDS[:2])
    assert got.delivered.token_count == 2


async def test_a_refused_connection_is_a_failed_backend(tmp_path):
    """The error names the address."""
    client = Provider(
        "http://127.0.0.1:9/v1",
        api_key_name="",
        keys=ApiKeys(tmp_path, clock=SystemClock()),
        stall=STALL,
        clock=SystemClock(),
    )
    with pytest.raises(BackendFailedError, match=r"127\.0\.0\.1"):
        await ask(client)
    await client.close()


async def test_a_server_error_is_retried_a_few_times(tmp_path):
    """If that does not help, the caller gets UNAVAILABLE."""
    async with mock_provider("500") as mock, client_of(mock, tmp_path) as client:
        with pytest.raises(BackendFailedError) as caught:
            await ask(client)
    assert caught.value.attempts == MAX_ATTEMPTS
    assert isinstance(client_error(caught.value, "BACKEND_FAILED"), Unavailable)


async def test_a_rate_limit_says_when_to_retry(tmp_path):
    """The time is for the breaker and for the caller."""
    async with mock_provider("429") as mock, client_of(mock, tmp_path) as client:
        mock.retry_after = "7"
        with pytest.raises(BackendFailedError) as caught:
            await ask(client)
    assert caught.value.retry_after_seconds == 7
    assert isinstance(client_error(caught.value, "BACKEND_RATE_LIMITED"), ResourceExhausted)
    assert caught.value.client_error.retry_after_seconds == 7


def test_every_form_of_retry_after_is_read():
    """Seconds, milliseconds, a date, a day at most; anything else counts as no wait."""
    clock = SystemClock()
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_seconds({"retry-after": "1.5"}, clock) == 1.5
    assert retry_after_seconds({"retry-after-ms": "250"}, clock) == 0.25
    assert 25 < retry_after_seconds({"retry-after": date}, clock) <= 30
    for value in ("soon", "", "-3", "Thu, 01 Jan 1970 00:00:00 GMT", "1e999x", "1e999", "\u00b2"):
        assert retry_after_seconds({"retry-after": value}, clock) == 0
    assert retry_after_seconds({}, clock) == 0
    assert retry_after_seconds({"retry-after-ms": "nan"}, clock) == 0
    assert retry_after_seconds({"retry-after": "1e300"}, clock) == MAX_RETRY_AFTER_SECONDS


@pytest.mark.parametrize("mode", ["401", "404", "redirect"])
async def test_errors_for_operators_are_reported_as_misconfiguration(mode, tmp_path):
    """A wrong key, an unknown model, a moved address: neither a retry nor the caller can help."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        with pytest.raises(BackendFailedError) as caught:
            await ask(client)
    assert caught.value.attempts == 1
    assert isinstance(client_error(caught.value, "BACKEND_MISCONFIGURED"), FailedPrecondition)
    assert len(mock.requests) == 1  # a redirect would have taken the key elsewhere


@pytest.mark.parametrize(
    ("mode", "reason", "text"),
    [
        ("400", "INVALID_FIELD", "the roles must alternate"),
        ("too_long", "PROMPT_TOO_LONG", "too many tokens"),
    ],
)
async def test_errors_for_the_caller_have_the_providers_text(mode, reason, text, tmp_path):
    """They are not failures of the backend, and no other backend is called."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        with pytest.raises(InvalidArgument) as caught:
            await ask(client)
    assert caught.value.reason == reason
    assert caught.value.field_violations == (("messages", text),)


@pytest.mark.parametrize("mode", ["429_long", "429_cut"])
async def test_an_error_is_read_whatever_its_body_is(mode, tmp_path):
    """The status is enough; the body may be endless or incomplete."""
    async with mock_provider(mode) as mock, client_of(mock, tmp_path) as client:
        mock.retry_after = "7"
        with pytest.raises(BackendFailedError) as caught:
            await ask(client)
    assert caught.value.retry_after_seconds == 7
    assert isinstance(client_error(caught.value, "BACKEND_RATE_LIMITED"), ResourceExhausted)


async def test_the_key_is_hidden_even_if_the_provider_quotes_it(tmp_path, capfd):
    """In the error and in the log."""
    async with mock_provider("quoting") as mock, client_of(mock, tmp_path) as client:
        with pytest.raises(InvalidArgument) as caught:
            await ask(client)
    assert caught.value.field_violations == (("messages", "you sent Bearer [API key]"),)
    assert "Bearer" not in caught.value.message  # which edges write to traces
    output = capfd.readouterr()
    assert KEY not in output.out + output.err


@pytest.mark.parametrize(
    "quoted",
    [r"sk-se\u0063ret\/1", r"\u0073k-secret/1", "sk-secret/1"],
)
def test_the_key_is_hidden_in_every_spelling_of_json(quoted: str):
    """In each field that the caller sees, also where it would be cut in its middle."""
    filler = "x" * (MAX_TEXT_LENGTH - 4)
    body = (
        f'{{"error": {{"message": "{filler}{quoted}", "code": "{quoted}", "param": "{quoted}"}}}}'
    )
    error = read_error(body.encode(), key="sk-secret/1")
    assert error.message == f"{filler}[API"
    assert (error.code, error.param) == ("[API key]", "[API key]")
    flat = read_error(f'{{"error": "{quoted}"}}'.encode(), key="sk-secret/1")
    assert flat.message == "[API key]"
    listed = read_error(f'{{"message": ["{quoted}"]}}'.encode(), key="sk-secret/1")
    assert listed.message == ""


async def test_connections_are_reused(tmp_path):
    """Sequential requests need one connection; concurrent ones need one each."""
    async with mock_provider() as mock, client_of(mock, tmp_path) as client:
        for _ in range(10):
            await ask(client)
        assert len(set(mock.peers)) == 1
        for _ in range(3):
            mock.peers.clear()
            await asyncio.gather(*(ask(client) for _ in range(8)))
            assert len(set(mock.peers)) == 8
        mock.mode = "slow"
        await asyncio.gather(*(ask(client) for _ in range(8)))
        mock.mode = "400"
        with pytest.raises(InvalidArgument):
            await ask(client)
        mock.mode, before = "ok", set(mock.peers)
        await ask(client)
        assert mock.peers[-1] in before


async def test_a_response_that_does_not_end_delays_no_answer(tmp_path, monkeypatch):
    """The answer is complete with its last event; the connection is closed a little later."""
    monkeypatch.setattr(provider_module, "LINGER_SECONDS", 0.1)
    async with mock_provider("endless") as mock, client_of(mock, tmp_path) as client:
        async with asyncio.timeout(0.25):  # before any deadline for tokens
            assert (await ask(client)).text == TEXT
        assert not mock.left.is_set()
        await asyncio.wait_for(mock.left.wait(), 2)


async def test_a_cancelled_request_closes_its_connection(tmp_path):
    """The provider sees it within 100 ms and stops."""
    async with mock_provider("stall_mid") as mock, client_of(mock, tmp_path) as client:
        task = asyncio.create_task(ask(client))
        await mock.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(mock.left.wait(), 0.1)


async def test_a_slow_reader_is_not_taken_for_a_stall(tmp_path, monkeypatch):
    """While the reader lags, no token is read, so none can be late."""
    monkeypatch.setattr("services.inference.generation.relay.MAX_WAITING_CHUNKS", 1)
    async with mock_provider("slow") as mock, client_of(mock, tmp_path) as client:
        relay, delivered = Relay(), Delivered()
        running = asyncio.create_task(
            client.generate("m", CALL, max_tokens=9, delivered=delivered, relay=relay)
        )
        await asyncio.sleep(2.5 * STALL.between_tokens_seconds)
        assert not running.done()
        running.add_done_callback(lambda _: relay.close())
        text = ""
        while (chunk := await relay.take()) is not None:
            text += chunk.text
        assert (await running).finish_reason == "stop"
        assert text == TEXT


async def test_resume_from_is_refused(tmp_path):
    """Chunks do not say where the reader's tokens end; the provider is not called."""
    async with mock_provider() as mock, client_of(mock, tmp_path) as client:
        with pytest.raises(InvalidArgument, match="resume_from"):
            await ask(client, call=replace(CALL, request=replace(CALL.request, resume_from=TOKEN)))
    assert not mock.requests


async def test_more_requests_than_the_limit_are_refused(tmp_path, monkeypatch):
    """The number of connections is limited; further requests are refused at once."""
    monkeypatch.setattr(provider_module, "MAX_CONNECTIONS", 2)
    async with mock_provider("slow") as mock, client_of(mock, tmp_path) as client:
        results = await asyncio.gather(*(ask(client) for _ in range(4)), return_exceptions=True)
    refused = [one for one in results if isinstance(one, HeadraceError)]
    assert [one.reason for one in refused] == ["QUEUE_FULL"] * 2
    assert len(mock.requests) == 2 < MAX_CONNECTIONS
