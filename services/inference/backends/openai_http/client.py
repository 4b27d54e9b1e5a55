"""An external provider with OpenAI's API as a backend: events or one object in, pieces out.

Each stream has a connection of its own, so that a cancelled call closes it and the provider stops.
Connections whose answer was read to its end are kept for the next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from urllib.parse import urlsplit

import orjson

from libs.clock import Clock
from libs.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from libs.http_client.client import HttpClient
from libs.http_client.response import HttpError, Response
from services.inference import metrics
from services.inference.backends.chat import ChunkSink
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.errors import (
    MAX_ATTEMPTS,
    failed,
    misconfigured,
    refusal,
)
from services.inference.backends.openai_http.response import ProviderAnswer, read_body
from services.inference.backends.stall import StallGuard, StallLimits
from services.inference.domain import (
    BACKENDS_FAILED,
    BackendFailedError,
    ChatCall,
    Delivered,
    Finish,
)

# Requests to one provider at once, from this process; each has a connection.
MAX_CONNECTIONS = 1024
CONNECT_SECONDS = 5.0
# Shorter than the five seconds that most servers keep: a connection must not be closed while a
# request is on its way.
KEEP_ALIVE_SECONDS = 4.0
# After its last event a stream has this long to end, else its connection is not used again.
LINGER_SECONDS = 1.0
MAX_ERROR_BYTES = 64 * 1024
# An answer that is not streamed shows no token until it is complete.
WHOLE_ANSWER_SECONDS = 300.0

_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "text/event-stream, application/json",
    # Tokens are small and come one by one: compression would hold them back.
    "Accept-Encoding": "identity",
    "User-Agent": "headrace",
}


class Provider:
    """One provider, under one API key."""

    def __init__(
        self, base_url: str, *, api_key_name: str, keys: ApiKeys, stall: StallLimits, clock: Clock
    ) -> None:
        self._host = urlsplit(base_url).hostname or ""
        self._api_key_name = api_key_name
        self._keys = keys
        self._stall = stall
        patience_seconds = max(WHOLE_ANSWER_SECONDS, stall.first_token_seconds)
        self._stall_of_whole = replace(stall, first_token_seconds=patience_seconds)
        self._clock = clock
        self._running = 0
        self._client = HttpClient(
            base_url.rstrip("/") + "/chat/completions",
            headers=_HEADERS,
            connect_seconds=CONNECT_SECONDS,
            keep_alive_seconds=KEEP_ALIVE_SECONDS,
        )

    async def generate(
        self,
        backend_model: str,
        call: ChatCall,
        *,
        max_tokens: int,
        delivered: Delivered,
        relay: ChunkSink,
    ) -> Finish:
        """Puts the pieces of an answer into the relay; it cannot go on with one that has begun.

        Raises:
            BackendFailedError: the provider failed, or is set up wrongly.
            HeadraceError: the provider refuses the request.
        """
        if call.request.resume_point:
            raise InvalidArgument.of_field(
                "resume_from",
                "not possible at a provider: providers do not report tokens",
            )
        if self._running >= MAX_CONNECTIONS:
            raise ResourceExhausted(
                "too many requests run at the provider",
                reason="QUEUE_FULL",
                metadata={"queue": "provider", "limit": str(MAX_CONNECTIONS)},
                retry_after_seconds=1.0,
            )
        self._running += 1
        try:
            if delivered.token_count:
                raise failed("a provider cannot go on with an answer")
            return await self._answer(
                _chat_request(backend_model, call, max_tokens=max_tokens),
                stall=self._stall if call.streamed else self._stall_of_whole,
                delivered=delivered,
                relay=relay,
            )
        except BackendFailedError as error:
            _explain(error, delivered)
            raise
        finally:
            self._running -= 1

    async def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    async def _answer(
        self, request: bytes, *, stall: StallLimits, delivered: Delivered, relay: ChunkSink
    ) -> Finish:
        headers = self._headers()
        with StallGuard(stall) as guard, _failures_of_http():
            response = await self._client.post(request, headers=headers)
            answer = ProviderAnswer(delivered=delivered, relay=relay, guard=guard)
            try:
                await self._check_status(response)
                ending = await answer.read(response)
            except BaseException:
                response.close()  # what was not read to its end cannot be used again
                raise
            self._linger(response)
        if not answer.has_usage:
            metrics.PROVIDER_ANSWERS_WITHOUT_USAGE.labels(self._host).inc()
        return ending

    @staticmethod
    def _linger(response: Response) -> None:
        """Lets HTTP end after the answer: that puts the connection back into the pool.

        Mostly it has by now. A provider that keeps it open longer gets a new connection next time.
        """
        if not response.done:
            asyncio.get_running_loop().call_later(LINGER_SECONDS, response.close)

    def _headers(self) -> Mapping[str, str]:
        if not self._api_key_name:
            return {}
        return {"Authorization": f"Bearer {self._key()}"}

    def _key(self) -> str:
        try:
            return self._keys.get(self._api_key_name)
        except FailedPrecondition as error:
            raise misconfigured(error.message) from error

    async def _check_status(self, response: Response) -> None:
        if response.status == HTTPStatus.OK:
            return
        body = await _error_body(response)
        if self._api_key_name:  # whoever quotes it must not spread it
            body = body.replace(self._key().encode(), b"[API key]")
        raise refusal(response.status, response.headers, body, self._clock)


async def _error_body(response: Response) -> bytes:
    try:
        return await read_body(response, MAX_ERROR_BYTES)
    except (HttpError, BackendFailedError):
        return b""  # the status says enough


def _chat_request(backend_model: str, call: ChatCall, *, max_tokens: int) -> bytes:
    asked = call.request
    body: dict[str, object] = {
        "model": backend_model,
        "messages": [{"role": each.role, "content": each.content} for each in asked.messages],
        "max_tokens": max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
    }
    if asked.seed is not None:
        body["seed"] = asked.seed
    if asked.stop:
        body["stop"] = list(asked.stop)
    if call.streamed:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return orjson.dumps(body)


@contextmanager
def _failures_of_http() -> Iterator[None]:
    try:
        yield
    except (HttpError, OSError) as error:  # timeouts are among the latter
        raise failed(f"{type(error).__name__}: {error}") from error


def _explain(error: BackendFailedError, delivered: Delivered) -> None:
    """Adds what holds for every failure of a provider."""
    error.attempts = error.attempts or MAX_ATTEMPTS
    if delivered.token_count:
        # Without token ids another backend would have to guess where the text stopped.
        error.resumable = False
        error.client_error = BACKENDS_FAILED
