"""An external provider with OpenAI's HTTP API as a backend.

Each answer has a connection of its own, so that cancelling the call closes it and the provider
stops. Connections whose answer was read to its end are reused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus

import orjson

from libs.clock import Clock
from libs.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from libs.http_client import (
    AddressRefusedError,
    HttpClient,
    HttpError,
    Network,
    Response,
    Url,
)
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
from services.inference.deadlines import deadline_exceeded, seconds_left
from services.inference.domain import (
    BACKENDS_FAILED,
    BackendFailedError,
    ChatCall,
    Delivered,
    Finish,
)

# Concurrent requests of this process to one provider; each has a connection.
MAX_CONNECTIONS = 1024
CONNECT_SECONDS = 5.0
# Shorter than the five seconds of most servers: a server must not close a connection while a
# request is on its way.
KEEP_ALIVE_SECONDS = 4.0
# After its last event a response has this long to end; else its connection is not reused.
LINGER_SECONDS = 1.0
MAX_ERROR_BYTES = 64 * 1024
# An answer that is not streamed shows no token until it is complete.
UNSTREAMED_ANSWER_SECONDS = 300.0

_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "text/event-stream, application/json",
    # Tokens are small and come one by one: compression would delay them.
    "Accept-Encoding": "identity",
    "User-Agent": "headrace",
}


class Provider:
    """One provider, called with one API key."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key_name: str,
        keys: ApiKeys,
        stall: StallLimits,
        clock: Clock,
        network: Network | None = None,
    ) -> None:
        self._url = _parsed(base_url)
        self._api_key_name = api_key_name
        self._keys = keys
        self._stall = stall
        self._unstreamed_stall = replace(
            stall,
            first_token_seconds=max(UNSTREAMED_ANSWER_SECONDS, stall.first_token_seconds),
        )
        self._clock = clock
        self._running = 0
        self._client = HttpClient(
            base_url.rstrip("/") + "/chat/completions",
            headers=_HEADERS,
            connect_seconds=CONNECT_SECONDS,
            keep_alive_seconds=KEEP_ALIVE_SECONDS,
            network=network,
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
        """See `ChatBackend.generate`. A provider cannot continue an answer that has started."""
        if call.request.resume_point:
            raise InvalidArgument.of_field(
                "resume_from", "is not supported by this model: its provider reports no token ids"
            )
        if self._running >= MAX_CONNECTIONS:
            raise ResourceExhausted.of_queue(
                "provider",
                "too many requests run at the provider",
                limit=MAX_CONNECTIONS,
                retry_after_seconds=1.0,
            )
        left = seconds_left(call.deadline_seconds, self._clock, waiting_for="backend")
        self._running += 1
        try:
            if delivered.token_count:
                raise failed("a provider cannot continue an answer")
            # Every other timeout in this block becomes a failure before it ends.
            async with asyncio.timeout(left):
                return await self._answer(
                    _chat_request(backend_model, call, max_tokens=max_tokens),
                    stall=self._stall if call.streamed else self._unstreamed_stall,
                    delivered=delivered,
                    relay=relay,
                )
        except BackendFailedError as error:
            _limit_retries(error, delivered)
            raise
        except TimeoutError as error:
            raise deadline_exceeded("backend") from error
        finally:
            self._running -= 1

    async def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    async def _answer(
        self, request: bytes, *, stall: StallLimits, delivered: Delivered, relay: ChunkSink
    ) -> Finish:
        with StallGuard(stall) as guard, _http_failures():
            key = await self._key()
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            response = await self._client.post(request, headers=headers)
            answer = ProviderAnswer(delivered=delivered, relay=relay, guard=guard)
            try:
                await self._check_status(response, key)
                finish = await answer.read(response)
            except BaseException:
                response.close()  # the rest of it is unread: its connection cannot be reused
                raise
            self._linger(response)
        if not answer.has_usage:
            metrics.PROVIDER_ANSWERS_WITHOUT_USAGE.labels(self._url.host if self._url else "").inc()
        return finish

    @staticmethod
    def _linger(response: Response) -> None:
        """Lets the response end after the last event, so that its connection can be reused.

        Most have ended by now. If a provider keeps one open longer, its connection is closed.
        """
        if not response.done:
            asyncio.get_running_loop().call_later(LINGER_SECONDS, response.close)

    async def _key(self) -> str:
        """Returns the API key; empty where the provider needs none."""
        if not self._api_key_name:
            return ""
        if self._url is None:
            raise misconfigured("the provider's URL is not valid: no API key is sent to it")
        try:
            return await self._keys.get(self._api_key_name, self._url)
        except FailedPrecondition as error:
            raise misconfigured(error.message) from error

    async def _check_status(self, response: Response, key: str) -> None:
        if response.status == HTTPStatus.OK:
            return
        body = await _error_body(response)
        # A provider may quote the key; the caller must not see it.
        raise refusal(response.status, response.headers, body, self._clock, key=key)


def _parsed(base_url: str) -> Url | None:
    """Returns a URL; None for one that an earlier version accepted."""
    try:
        return Url.parse(base_url)
    except ValueError:
        return None


async def _error_body(response: Response) -> bytes:
    try:
        return await read_body(response, MAX_ERROR_BYTES)
    except (HttpError, BackendFailedError):
        return b""  # the status says enough


def _chat_request(backend_model: str, call: ChatCall, *, max_tokens: int) -> bytes:
    request = call.request
    body: dict[str, object] = {
        "model": backend_model,
        "messages": [{"role": each.role, "content": each.content} for each in request.messages],
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if call.streamed:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return orjson.dumps(body)


@contextmanager
def _http_failures() -> Iterator[None]:
    try:
        yield
    except AddressRefusedError as error:
        raise misconfigured(
            "the provider is at an address that is not allowed: see "
            "HEADRACE_PROVIDER_ALLOWED_NETWORKS"
        ) from error
    except (HttpError, OSError) as error:  # timeouts are among the latter
        raise failed(f"{type(error).__name__}: {error}") from error


def _limit_retries(error: BackendFailedError, delivered: Delivered) -> None:
    """Adds what holds for every failure of a provider."""
    error.attempts = error.attempts or MAX_ATTEMPTS
    if delivered.token_count:
        # Without token ids another backend would have to guess where the text stopped.
        error.resumable = False
        error.client_error = BACKENDS_FAILED
