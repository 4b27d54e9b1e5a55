"""Publishing to a real NATS server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import STREAMS, USAGE, USAGE_RECORDED, Stream
from libs.errors import InvalidArgument, ResourceExhausted, Unavailable
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.integration

TINY = Stream(name="TINY", subjects=("test.tiny",), max_messages=2, max_bytes=1_000_000)
NARROW = Stream(name="NARROW", subjects=("test.narrow",), max_messages=100, max_bytes=4_000)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with running_nats(tmp_path) as running:
        yield running


@pytest.fixture
async def js(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    client = await connect(server.url, name="test")
    yield client.jetstream()
    await client.drain()


def event(usage_id: str) -> events_pb2.UsageRecorded:
    return events_pb2.UsageRecorded(usage_id=usage_id)


async def stored(js: JetStreamContext, stream: Stream) -> int:
    return (await js.stream_info(stream.name)).state.messages


async def test_streams_keep_work_on_disk_and_refuse_rather_than_drop(js: JetStreamContext) -> None:
    """What the server has is what the definitions say, and making them again changes nothing."""
    await ensure_streams(js)
    await ensure_streams(js)
    for stream in STREAMS:
        config = (await js.stream_info(stream.name)).config
        assert (config.retention, config.storage, config.discard) == ("workqueue", "file", "new")
        assert (config.max_msgs, config.max_bytes) == (stream.max_messages, stream.max_bytes)
        assert config.duplicate_window == 120.0


async def test_new_limits_reach_a_stream_that_exists(js: JetStreamContext) -> None:
    """A release may change a limit; the messages stay."""
    await ensure_streams(js, streams=[TINY])
    await Publisher(js).publish("test.tiny", event("a"), message_id="a")
    wider = Stream(name="TINY", subjects=("test.tiny",), max_messages=9, max_bytes=1_000_000)
    await ensure_streams(js, streams=[wider])
    assert (await js.stream_info("TINY")).config.max_msgs == 9
    assert await stored(js, TINY) == 1


async def test_many_processes_make_the_streams_at_once(server: NatsServer) -> None:
    """Services start in any order, also all together."""
    clients = await asyncio.gather(*(connect(server.url, name=str(n)) for n in range(5)))
    await asyncio.gather(*(ensure_streams(client.jetstream()) for client in clients))
    assert await stored(clients[0].jetstream(), USAGE) == 0
    await asyncio.gather(*(client.drain() for client in clients))


async def test_a_message_is_stored_when_publish_returns(
    js: JetStreamContext, server: NatsServer
) -> None:
    """Killed right after the acknowledgement, the server has the message when it is back."""
    await ensure_streams(js)
    publisher = Publisher(js)
    for number in range(20):
        await publisher.publish(USAGE_RECORDED, event(str(number)), message_id=str(number))
    await server.kill()
    await server.start()
    await ensure_streams(js)
    assert await stored(js, USAGE) == 20


async def test_the_same_message_id_is_stored_once(js: JetStreamContext) -> None:
    """A publisher may repeat a message if it got no acknowledgement."""
    await ensure_streams(js)
    publisher = Publisher(js)
    for _ in range(3):
        await publisher.publish(USAGE_RECORDED, event("a"), message_id="a")
    assert await stored(js, USAGE) == 1


@pytest.mark.parametrize(
    ("stream", "limit"), [(TINY, "2 messages"), (NARROW, "4000 bytes")], ids=["messages", "bytes"]
)
async def test_a_full_stream_is_resource_exhausted(
    js: JetStreamContext, stream: Stream, limit: str
) -> None:
    """The caller learns which queue is full, its limit and when to try again; nothing is lost."""
    await ensure_streams(js, streams=[stream])
    publisher = Publisher(js, streams=[stream])
    (subject,) = stream.subjects
    published = await asyncio.gather(
        *(
            publisher.publish(subject, event("x" * 500), message_id=str(number))
            for number in range(20)
        ),
        return_exceptions=True,
    )
    assert await stored(js, stream) == sum(isinstance(each, int) for each in published) >= 2
    with pytest.raises(ResourceExhausted) as raised:
        await publisher.publish(subject, event("x" * 500), message_id="one more")
    assert raised.value.reason == "QUEUE_FULL"
    assert raised.value.metadata == {"queue": stream.name, "limit": limit}
    assert raised.value.retry_after_seconds


async def test_a_server_that_is_away_is_unavailable_in_time(
    js: JetStreamContext, server: NatsServer
) -> None:
    """The deadline is kept, and what failed is not sent behind the caller's back later."""
    await ensure_streams(js)
    await server.kill()
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(Unavailable) as raised:
        await Publisher(js).publish(USAGE_RECORDED, event("a"), message_id="a", timeout_seconds=0.5)
    assert loop.time() - started < 2.0
    assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert raised.value.metadata == {"dependency": "nats"}
    await server.start()
    await ensure_streams(js)
    assert await stored(js, USAGE) == 0


async def test_a_restart_is_waited_out(js: JetStreamContext, server: NatsServer) -> None:
    """A caller with patience does not notice that the server was killed."""
    await ensure_streams(js)
    await server.kill()
    publishing = asyncio.create_task(
        Publisher(js).publish(USAGE_RECORDED, event("a"), message_id="a", timeout_seconds=15)
    )
    await asyncio.sleep(0.5)
    await server.start()
    await publishing
    assert await stored(js, USAGE) == 1


async def test_a_stream_that_is_missing_is_unavailable(js: JetStreamContext) -> None:
    """Without a stream for it, publishing is an outage, not a success."""
    with pytest.raises(Unavailable):
        await Publisher(js).publish(USAGE_RECORDED, event("a"), message_id="a", timeout_seconds=0.3)


async def test_a_message_over_the_limit_of_the_server_is_the_callers_fault(
    js: JetStreamContext,
) -> None:
    """It is refused here, and the connection goes on."""
    await ensure_streams(js)
    publisher = Publisher(js)
    with pytest.raises(InvalidArgument) as raised:
        await publisher.publish(USAGE_RECORDED, event("x" * 9_000_000), message_id="a")
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    await publisher.publish(USAGE_RECORDED, event("b"), message_id="b")


async def test_a_client_that_was_closed_is_unavailable_at_once(server: NatsServer) -> None:
    """Waiting would not help: a closed client stays closed."""
    client = await connect(server.url, name="test")
    publisher = Publisher(client.jetstream())
    await client.drain()
    async with asyncio.timeout(1):
        with pytest.raises(Unavailable):
            await publisher.publish(USAGE_RECORDED, event("a"), message_id="a")


async def test_connect_waits_for_a_server_that_is_not_there_yet(server: NatsServer) -> None:
    """Services start in any order."""
    await server.kill()
    connecting = asyncio.create_task(connect(server.url, name="test"))
    await asyncio.sleep(0.5)
    assert not connecting.done()
    await server.start()
    async with asyncio.timeout(5):
        client = await connecting
    await ensure_streams(client.jetstream())
    await client.drain()


async def test_drain_ends_while_the_server_is_away(server: NatsServer) -> None:
    """A process that shuts down does not wait for NATS."""
    client = await connect(server.url, name="test")
    await server.kill()
    await asyncio.sleep(0.3)
    assert not client.is_connected
    async with asyncio.timeout(3):
        await client.drain()
    assert client.is_closed


async def test_a_server_that_stops_in_good_order_is_reconnected(
    js: JetStreamContext, server: NatsServer
) -> None:
    """A deployment of the server must not close our connections for good."""
    await ensure_streams(js)
    await server.stop()
    await asyncio.sleep(0.3)
    await server.start()
    await Publisher(js).publish(USAGE_RECORDED, event("a"), message_id="a", timeout_seconds=10)
    assert await stored(js, USAGE) == 1
