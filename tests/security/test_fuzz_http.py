"""Ten thousand changed byte streams of HTTP/1.1 and of HTTP/2, through the edge and behind it."""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import grpc
import pytest
from hpack import Encoder

from tests.fuzz.corpus import EXAMPLES, TOKENS
from tests.fuzz.mutate import Mutator
from tests.support import http2_frames as frames
from tests.support.fuzzing import ALL_SCOPES, Slowest, heartbeat, in_parallel, unharmed
from tests.support.http2_frames import FrameType
from tests.support.http_bytes import HttpService, answer, post, serving_one_path
from tests.support.mesh import RunningMesh
from tests.support.service import running_service

pytestmark = [pytest.mark.integration, pytest.mark.storm]

CONNECTIONS = 10_000
BEHIND = 5_000
WIDTH = 16
# A request that is not complete has no response: then the test closes the connection.
READ_SECONDS = 0.1
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
# Of responses to bytes that may mean anything. 503: the edge resets a request that is cut off.
_FAULTS = frozenset({500, 502, 505})
_LIST_MODELS = "/headrace.registry.v1.RegistryService/ListModels"


class Session(NamedTuple):
    """What is sent on one connection."""

    sent: bytes


class Edge:
    """Connections to one address."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.slowest = Slowest[Session]()
        self.statuses: dict[int, int] = {}

    async def send(self, session: Session) -> bytes:
        """Sends bytes on a connection of their own; returns what comes back."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        received = b""
        with suppress(ConnectionError, TimeoutError):
            writer.write(session.sent)
            writer.write_eof()
            async with asyncio.timeout(READ_SECONDS):
                while data := await reader.read(1 << 16):
                    received += data
            self.slowest.add(time.perf_counter() - began, session)
        writer.transport.abort()
        for status in map(int, _STATUS.findall(received)):
            self.statuses[status] = self.statuses.get(status, 0) + 1
            assert status not in _FAULTS, received
        return received


def http1_sessions(token: str, count: int) -> Iterator[Session]:
    """Yields requests, several of them on some connections; the same ones each time."""
    mutator = Mutator("http1", TOKENS["http_request"])
    bearer = f"authorization: Bearer {token}\r\nhost: ".encode()
    examples = [one.replace(b"host: ", bearer) for one in EXAMPLES["http_request"]]
    examples += [
        b"GET /v1/models HTTP/1.1\r\n%ba\r\n\r\n" % bearer,
        b"GET /v1/models/a%%20b HTTP/1.1\r\n%ba\r\n\r\n" % bearer,
        b"POST %b HTTP/1.1\r\n%ba\r\ncontent-type: application/json\r\n"
        b"content-length: 2\r\n\r\n{}" % (_LIST_MODELS.encode(), bearer),
        b"POST %b HTTP/1.1\r\n%ba\r\ncontent-type: application/grpc-web+proto\r\n"
        b"content-length: 5\r\n\r\n\0\0\0\0\0" % (_LIST_MODELS.encode(), bearer),
    ]
    for _ in range(count):
        yield Session(mutator.mutated(examples))


def http2_sessions(token: str, count: int, *, whole_headers: bool = False) -> Iterator[Session]:
    """Yields connections with a call or two; the same ones each time.

    Args:
        token: the bearer token.
        count: how many connections.
        whole_headers: header blocks are not changed.
    """
    mutator = Mutator("http2", [frames.settings({}), bytes(9), b"\0\0\1\0", b"\x88"])
    source = mutator.random
    for _ in range(count):
        parts = [frames.settings({})]
        encoder = Encoder()
        for stream_id in (1, 3)[: source.randint(1, 2)]:
            path = source.choice((_LIST_MODELS, "/grpc.health.v1.Health/Check", "/a.B/C"))
            block = encoder.encode(
                [
                    (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a"),
                    ("content-type", "application/grpc"), ("te", "trailers"),
                    ("authorization", f"Bearer {token}"), ("grpc-timeout", "1S"),
                ]
            )  # fmt: skip
            parts += [
                frames.frame(FrameType.HEADERS, frames.END_HEADERS, stream_id, block),
                frames.data(stream_id, struct.pack(">BI", 0, 0), end=True),
            ]
        parts += [
            frames.window_update(source.choice((0, 1)), source.choice((1, 2**31 - 1))),
            frames.frame(FrameType.PING, 0, 0, bytes(8)),
            frames.frame(source.randint(2, 12), source.randint(0, 255), 1, source.randbytes(9)),
        ]
        if source.random() < 0.3:
            source.shuffle(parts)
        if whole_headers:
            parts = [
                part if part[3] == FrameType.HEADERS else mutator.mutated([part])[:4096]
                for part in parts
            ]
            body = b"".join(parts)
        else:
            body = mutator.mutated([b"".join(parts)])
        yield Session((frames.PREFACE if source.random() < 0.95 else b"") + body)


async def beats_of(mesh: RunningMesh, channel: grpc.aio.Channel) -> None:
    """Makes a call that succeeds."""
    metadata = mesh.metadata(scopes=ALL_SCOPES)
    call = channel.unary_unary(_LIST_MODELS, request_serializer=None, response_deserializer=None)(
        b"", metadata=metadata, timeout=5
    )
    await call


@pytest.mark.parametrize("sessions", [http1_sessions, http2_sessions])
async def test_the_mesh_survives_any_bytes(bare_mesh, sessions):
    """No response says that the mesh is at fault; others are answered; nothing restarts."""
    token = bare_mesh.token(scopes=ALL_SCOPES)
    edge = Edge(bare_mesh.address)
    with unharmed(bare_mesh):
        async with bare_mesh.channel() as channel:
            async with heartbeat(lambda: beats_of(bare_mesh, channel)):
                await in_parallel(sessions(token, CONNECTIONS), edge.send, width=WIDTH)
            await beats_of(bare_mesh, channel)
    print(edge.statuses)


async def test_the_http1_server_survives_any_bytes():
    """Behind the edge, from which only what it forwards comes."""
    async with serving_one_path() as service:
        edge = Edge(service.server.address)
        sessions = (
            Session(session.sent.replace(b"/v1/chat/completions", b"/path"))
            for session in http1_sessions("token", BEHIND)
        )
        await in_parallel(sessions, edge.send, width=WIDTH)
        await edge.slowest.check(edge.send)
        async with service.caller() as caller:
            caller.writer.write(post(b"good"))
            assert await answer(caller) == (200, b"good")
        await _no_connections(service)
    assert edge.statuses[200] > BEHIND / 100
    assert edge.statuses[400] > BEHIND / 100


async def _no_connections(service: HttpService) -> None:
    async with asyncio.timeout(5):
        while service.connections:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)


async def test_the_grpc_server_survives_any_bytes(tmp_path):
    """Behind the edge. Header blocks stay whole: a path that is not UTF-8 ends gRPC's server."""
    async with running_service("registry", tmp_path) as service:
        edge = Edge(service.address)
        sessions = http2_sessions("token", BEHIND, whole_headers=True)
        await in_parallel(sessions, edge.send, width=WIDTH)
        assert service.process.returncode is None
        assert await service.health() == "SERVING"
