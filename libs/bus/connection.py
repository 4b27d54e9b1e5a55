"""The connection to NATS, which reconnects after restarts of the server, and its streams."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import ParseResult

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.js import JetStreamContext, api
from nats.js.errors import BadRequestError, NotFoundError, ServiceUnavailableError
from prometheus_client import Gauge
from typing_extensions import override

from libs.bus.inboxes import inbox_prefix
from libs.bus.subjects import STREAMS, Consumer, Stream
from libs.tls import MESH_NAME, TlsFiles

_log = structlog.get_logger()

_CONNECTED = Gauge("headrace_bus_connected", "1 while NATS is connected, else 0.")

# Buffer for messages while the server is down; when it is full, publishing fails immediately.
PENDING_LIMIT_BYTES = 8 * 1024 * 1024
RECONNECT_PAUSE_SECONDS = 0.2
CONNECT_TIMEOUT_SECONDS = 2
# A frozen server is detected after two intervals, a closed connection immediately.
PING_INTERVAL_SECONDS = 10
DRAIN_TIMEOUT_SECONDS = 5

_STREAM_EXISTS_WITH_OTHER_CONFIG = 10058
_NOT_SERVED_YET = (TimeoutError, ServiceUnavailableError, nats.errors.NoRespondersError)
_NOT_SERVED_PAUSE_SECONDS = 0.2

T = TypeVar("T")


class _TlsTransport(TcpTransport):
    """Connects with TLS from the first byte.

    nats-py connects first and then changes to TLS: if that fails, it waits indefinitely for the
    end of the connection. It also continues without TLS where the server, or a program in its
    place, does not ask for it.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # has no types
        self._context = context

    @override
    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        async with asyncio.timeout(connect_timeout):
            self._io_reader, self._io_writer = await asyncio.open_connection(
                uri.hostname,
                uri.port,
                limit=buffer_size,
                ssl=self._context,
                server_hostname=MESH_NAME,
            )

    @override
    def __bool__(self) -> bool:
        return True  # otherwise it is replaced before it connects

    @override
    async def connect_tls(self, *_: Any, **__: Any) -> None:
        """It is connected with TLS already."""


class _Connection(Client):
    """A client whose `drain` only closes the connection while the server is down."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._context = context

    @override
    async def _connect_to_server(self, s: Any) -> None:
        if self._context is not None:
            self._transport = _TlsTransport(self._context)
        await super()._connect_to_server(s)

    @override
    async def drain(self) -> None:
        if self.is_connected:
            await super().drain()
        elif not self.is_closed:
            await self.close()


async def connect(
    url: str, *, name: str, credentials_file: Path | None = None, tls: TlsFiles | None = None
) -> Client:
    """Connects, waiting until the server is up; reconnects from then on.

    Args:
        url: `nats://host:port`, or several, separated by commas.
        name: shown in the server's monitoring.
        credentials_file: a file with `USER:PASSWORD`. None: the server needs none.
        tls: the certificates of this process. The handshake comes first, so that nothing is sent
            to a program that took the server's port.

    Raises:
        OSError: the file cannot be read.
    """
    user, password = _credentials(credentials_file)
    context = tls.client_context() if tls else None
    client = _Connection(context)
    states = _StateLog(client, name)
    await client.connect(
        servers=url.split(","),
        name=name,
        user=user or None,
        password=password or None,
        inbox_prefix=inbox_prefix(user),
        tls=context,
        tls_handshake_first=context is not None,
        error_cb=states.on_error,
        disconnected_cb=states.on_disconnected,
        reconnected_cb=states.on_connected,
        closed_cb=states.on_closed,
        max_reconnect_attempts=-1,
        reconnect_time_wait=RECONNECT_PAUSE_SECONDS,  # type: ignore[arg-type]  # fractions work
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        ping_interval=PING_INTERVAL_SECONDS,
        pending_size=PENDING_LIMIT_BYTES,
        drain_timeout=DRAIN_TIMEOUT_SECONDS,
    )
    await states.on_connected()
    return client


async def ensure_streams(
    js: JetStreamContext,
    *,
    streams: Iterable[Stream] = STREAMS,
    update: bool = True,
    replicas: int = 1,
) -> None:
    """Creates the streams or updates them to their definitions; waits until JetStream serves.

    Several processes may call it at the same time.

    Args:
        js: JetStream.
        streams: what to create.
        update: whether a stream with other settings is updated. Only the service that owns a
            stream may do so; for others it is good enough as it is.
        replicas: on how many servers of a cluster a stream is stored.

    Raises:
        nats.js.errors.APIError: a stream exists with a setting that cannot be changed, such as
            another storage.
    """
    for stream in streams:
        await until_served(partial(_ensure_stream, js, _config(stream, replicas), update))


async def ensure_consumer(js: JetStreamContext, consumer: Consumer) -> None:
    """Creates a durable consumer, and its stream if that is missing; waits for JetStream."""
    config = api.ConsumerConfig(
        name=consumer.name,
        durable_name=consumer.name,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=consumer.ack_wait_seconds,
        max_ack_pending=consumer.max_in_flight,
        # The worker counts attempts itself: a message that exceeds the limit of the server would
        # stay in the stream, reported only by an advisory that is sent once and not stored.
        max_deliver=-1,
    )

    async def ensure() -> None:
        try:
            await js.add_consumer(consumer.stream.name, config)
        except NotFoundError:
            await ensure_streams(js, streams=[consumer.stream], update=False)
            await js.add_consumer(consumer.stream.name, config)

    await until_served(ensure)


async def until_served(request: Callable[[], Awaitable[T]]) -> T:
    """Repeats a JetStream request until a server answers it."""
    is_logged = False
    while True:
        try:
            return await request()
        except _NOT_SERVED_YET as error:
            if not is_logged:
                _log.warning("waiting for JetStream", error=error)
                is_logged = True
            await asyncio.sleep(_NOT_SERVED_PAUSE_SECONDS)


def _credentials(file: Path | None) -> tuple[str, str]:
    user, _, password = file.read_text().strip().partition(":") if file else ("", "", "")
    return user, password


def client_of(js: JetStreamContext) -> Client:
    """Returns the connection of a JetStream context."""
    return js._nc  # noqa: SLF001  # the only way to it


def _config(stream: Stream, replicas: int) -> api.StreamConfig:
    return api.StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        retention=api.RetentionPolicy.WORK_QUEUE,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        max_msgs=stream.max_messages,
        max_bytes=stream.max_bytes,
        duplicate_window=stream.duplicate_window_seconds,
        num_replicas=replicas,
    )


async def _ensure_stream(js: JetStreamContext, config: api.StreamConfig, update: bool) -> None:
    try:
        await js.add_stream(config)
    except BadRequestError as error:
        if error.err_code != _STREAM_EXISTS_WITH_OTHER_CONFIG:
            raise
        if update:
            await js.update_stream(config)
        else:
            _log.info("another service updates the stream", stream=config.name)


class _StateLog:
    """Logs changes of the state of the connection, and the first error of each outage."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._log = _log.bind(connection=name)
        self._in_outage = False
        _CONNECTED.set(0)

    async def on_connected(self) -> None:
        self._in_outage = False
        _CONNECTED.set(1)
        self._log.info("connected to NATS")

    async def on_disconnected(self) -> None:
        _CONNECTED.set(0)
        if not self._client.is_closed:
            self._log.warning("lost NATS; reconnecting")

    async def on_error(self, error: Exception) -> None:
        if self._in_outage:
            return
        self._in_outage = True
        self._log.warning("NATS error", error=error)

    async def on_closed(self) -> None:
        _CONNECTED.set(0)
        self._log.info("closed the connection to NATS")
