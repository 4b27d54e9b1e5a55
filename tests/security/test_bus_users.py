"""The bus accepts nobody without a password, and each service may do only its own work."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from headrace.events.v1 import events_pb2
from nats.aio.client import Client

from deploy import keys
from deploy.certificates import ensure_certificates, tls_files
from deploy.nats.users import SYSTEM_USER, USERS
from libs.bus.broadcast import Broadcaster, listen
from libs.bus.connection import connect, ensure_streams
from libs.bus.durability import SERVER_CONFIG_SUBJECT, check_durable
from libs.bus.publisher import Publisher
from libs.bus.subjects import (
    COST,
    JOB_CANCELLED,
    JOB_FINISHED,
    JOB_RECORDS,
    JOB_STARTED,
    JOB_SUBMITTED,
    JOBS,
    OUTCOMES,
    STREAMS,
    USAGE,
    USAGE_BATCH_RECORDED,
    USAGE_RECORDED,
    WORKER,
    Consumer,
)
from libs.bus.worker import Delivery, PullWorker
from libs.tls import MESH_NAME
from tests.support.bus_users import bus_of_a_mesh, client_of, home_of_the_bus, intruder, tls_of
from tests.support.nats import NatsServer

__all__ = ["bus_of_a_mesh", "home_of_the_bus"]  # fixtures

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

SUBJECTS = {
    USAGE_RECORDED, USAGE_BATCH_RECORDED, JOB_SUBMITTED, JOB_CANCELLED, JOB_STARTED, JOB_FINISHED,
}  # fmt: skip
CANARY = "canary-prompt"
REFUSED_SECONDS = 0.3


@pytest.mark.parametrize(
    "credentials",
    [{}, {"user": "inference", "password": "guess"}, {"user": "anyone", "password": "x"}],
    ids=["none", "wrong", "unknown"],
)
async def test_nobody_connects_without_a_password(bus: NatsServer, home: Path, credentials):
    """Whoever is on the machine can reach the port."""
    with pytest.raises(nats.errors.Error):
        async with asyncio.timeout(10):
            await nats.connect(
                bus.url,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                **credentials,
                **tls_of(home),
            )


async def test_nobody_connects_without_a_certificate(bus: NatsServer, home: Path):
    """A password that leaked is not enough; the server does not even greet."""
    port = int(bus.url.rpartition(":")[2])
    anybody = ssl.create_default_context(cafile=str(tls_files(home, "jobs").ca))

    def greeting(context: ssl.SSLContext | None) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            if context is None:
                connection.sendall(b"CONNECT {}\r\nPING\r\n")
                return connection.recv(100)
            with context.wrap_socket(connection, server_hostname=MESH_NAME) as secure:
                return secure.recv(100)

    member = tls_files(home, "jobs").client_context()
    assert (await asyncio.to_thread(greeting, member)).startswith(b"INFO")
    for context in (None, anybody):
        with suppress(OSError):  # the server closed the connection
            assert b"INFO" not in await asyncio.to_thread(greeting, context)


async def test_a_program_on_the_port_of_the_bus_learns_nothing(home: Path):
    """While NATS is down, any account can listen there: it gets no password and no message."""
    ensure_certificates(home)
    keys.ensure_nats_credentials(home, ["jobs"])
    received = bytearray()
    connections = asyncio.Semaphore(0)

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.release()
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576}\r\n')
        received.extend(await reader.read(65536))
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connecting = asyncio.create_task(
        connect(
            f"nats://127.0.0.1:{port}",
            name="jobs",
            credentials_file=keys.nats_credentials_path(home, "jobs"),
            tls=tls_files(home, "jobs"),
        )
    )
    async with asyncio.timeout(20):
        for _ in range(3):
            await connections.acquire()
    assert not connecting.done()
    connecting.cancel()
    server.close()
    password = keys.nats_credentials_path(home, "jobs").read_bytes().partition(b":")[2]
    assert received
    assert password not in received
    assert b"CONNECT" not in received


async def test_services_do_their_work_with_their_permissions(bus: NatsServer, home: Path):
    """Jobs and outcomes and usage arrive; streams and consumers are made by whoever comes first."""
    arrived: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def take(consumer: str, delivery: Delivery[Any]) -> None:
        await arrived.put((consumer, delivery.subject))

    async with (
        client_of(bus, home, "inference") as inference,
        client_of(bus, home, "embedding_cache") as embedding_cache,
        client_of(bus, home, "worker") as worker,
        client_of(bus, home, "jobs") as jobs,
        client_of(bus, home, "cost") as cost,
    ):
        clients = {"worker": worker, "jobs": jobs, "cost": cost}
        for client, streams, update in (
            (inference, [USAGE], False),
            (embedding_cache, [USAGE], False),
            (worker, [JOBS, OUTCOMES, USAGE], False),
            (jobs, [JOBS, OUTCOMES], True),
            (cost, [USAGE], True),
        ):
            await ensure_streams(client.jetstream(), streams=streams, update=update)
        cancelled = asyncio.Event()
        await listen(worker, JOB_CANCELLED, lambda _: cancelled.set())
        await worker.flush()
        async with asyncio.TaskGroup() as group:
            running = [
                _pull(clients[name], consumer, partial(take, consumer.name))
                for name, consumer in (("worker", WORKER), ("jobs", JOB_RECORDS), ("cost", COST))
            ]
            tasks = [group.create_task(pulling) for pulling in running]
            publish = [
                (jobs, JOB_SUBMITTED, events_pb2.JobSubmitted(job_id="j")),
                (worker, JOB_STARTED, events_pb2.JobStarted(job_id="j")),
                (worker, JOB_FINISHED, events_pb2.JobFinished(job_id="j")),
                (inference, USAGE_RECORDED, events_pb2.UsageRecorded(usage_id="a")),
                (embedding_cache, USAGE_BATCH_RECORDED, events_pb2.UsageBatchRecorded()),
            ]
            for number, (client, subject, message) in enumerate(publish):
                publisher = Publisher(client.jetstream())
                await publisher.publish(subject, message, message_id=str(number))
            await Broadcaster(jobs).publish(JOB_CANCELLED, events_pb2.JobCancelled(job_id="j"))
            async with asyncio.timeout(20):
                got = {await arrived.get() for _ in publish}
                await cancelled.wait()
            await _until_acknowledged(jobs, cost)
            for task in tasks:
                task.cancel()
        assert got == {
            ("worker", JOB_SUBMITTED),
            ("jobs", JOB_STARTED),
            ("jobs", JOB_FINISHED),
            ("cost", USAGE_RECORDED),
            ("cost", USAGE_BATCH_RECORDED),
        }


async def _pull(client: Client, consumer: Consumer, handle) -> None:
    async def give_up(_: Delivery[Any]) -> None:
        raise AssertionError

    worker = PullWorker[events_pb2.JobSubmitted](
        client.jetstream(), consumer, concurrency=4, on_exhausted=give_up
    )
    await worker.run(handle)


async def _until_acknowledged(jobs: Client, cost: Client) -> None:
    """Waits until the streams are empty: the acknowledgements were accepted."""
    async with asyncio.timeout(20):
        for client, stream in ((jobs, JOBS), (jobs, OUTCOMES), (cost, USAGE)):
            js = client.jetstream()
            while (await js.stream_info(stream.name)).state.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("user", USERS)
async def test_a_service_publishes_only_what_is_its_own(bus: NatsServer, home: Path, user: str):
    """A stolen password of one service forges nothing of another."""
    access = USERS[user]
    consumer = access.consumes
    api = "$JS.API"
    forbidden = [
        *sorted(SUBJECTS - set(access.publishes)),
        "headrace.anything",
        *(f"{api}.STREAM.DELETE.{stream.name}" for stream in STREAMS),
        *(f"{api}.STREAM.PURGE.{stream.name}" for stream in STREAMS),
        *(
            f"{api}.STREAM.MSG.DELETE.{stream.name}"
            for stream in STREAMS
            if stream not in access.erases
        ),
        *(f"{api}.STREAM.UPDATE.{stream.name}" for stream in STREAMS if stream not in access.owns),
        *(
            f"{api}.STREAM.MSG.GET.{stream.name}"
            for stream in STREAMS
            if stream not in access.reads_messages
        ),
        *(f"{api}.DIRECT.GET.{stream.name}" for stream in STREAMS),
        *(f"{api}.CONSUMER.CREATE.{stream.name}.spy" for stream in STREAMS),
        *(f"{api}.CONSUMER.DURABLE.CREATE.{stream.name}.spy" for stream in STREAMS),
        *(
            f"{api}.CONSUMER.MSG.NEXT.{other.stream.name}.{other.name}"
            for other in (COST, WORKER, JOB_RECORDS)
            if other != consumer
        ),
        *(
            f"$JS.ACK.{other.stream.name}.{other.name}.1.1.1.1.0"
            for other in (COST, WORKER, JOB_RECORDS)
            if other != consumer
        ),
        *(f"_INBOX.{other}.forged" for other in USERS),
        SERVER_CONFIG_SUBJECT,
        "$SYS.REQ.SERVER.PING.CONNZ",
    ]
    async with intruder(bus, home, user) as recorder:
        allowed = [subject for subject in forbidden if await recorder.may_publish(subject)]
        assert allowed == []
        for subject in access.publishes:
            assert await recorder.may_publish(subject)


@pytest.mark.parametrize("user", [*USERS, SYSTEM_USER])
async def test_a_service_reads_no_messages_of_others(bus: NatsServer, home: Path, user: str):
    """Neither as they are published nor as they are delivered to their consumer."""
    others = [other for other in (*USERS, SYSTEM_USER) if other != user]
    listens = USERS[user].listens if user in USERS else ()
    forbidden = [
        ">", "headrace.>", "_INBOX.>", "$JS.>", "$SYS.>", "$SYS.ACCOUNT.>",
        *sorted(SUBJECTS - set(listens)),
        *(f"_INBOX.{other}.>" for other in others),
    ]  # fmt: skip
    async with intruder(bus, home, user) as recorder:
        allowed = [subject for subject in forbidden if await recorder.may_subscribe(subject)]
        assert allowed == []
        async with client_of(bus, home, "jobs") as jobs:
            await ensure_streams(jobs.jetstream(), streams=[JOBS])
            event = events_pb2.JobSubmitted(job_id=CANARY)
            await Publisher(jobs.jetstream()).publish(JOB_SUBMITTED, event, message_id="1")
        await asyncio.sleep(REFUSED_SECONDS)
        assert not [message for message in recorder.received if CANARY in message]


async def test_the_system_user_asks_only_how_the_server_is_configured(bus: NatsServer, home: Path):
    """What the check of durability needs; not who is connected, and no reload or shutdown."""
    credentials = keys.nats_credentials_path(home, SYSTEM_USER)
    await check_durable(bus.url, credentials, tls=tls_files(home, "jobs"))
    async with intruder(bus, home, SYSTEM_USER) as recorder:
        for subject in (
            "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.PING.SUBSZ", "$SYS.REQ.SERVER.RELOAD",
            "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.REQ.SERVER.PING.JSZ", JOB_SUBMITTED,
        ):  # fmt: skip
            assert not await recorder.may_publish(subject)


async def test_clients_come_back_after_the_bus_was_killed(bus: NatsServer, home: Path):
    """Also where another program had its port in between."""
    port = int(bus.url.rpartition(":")[2])

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576}\r\n')
        await reader.read(65536)
        writer.close()

    async with client_of(bus, home, "jobs") as jobs:
        await ensure_streams(jobs.jetstream(), streams=[JOBS])
        await bus.kill()
        server = await asyncio.start_server(pretend, "127.0.0.1", port)
        await asyncio.sleep(1)
        server.close()
        await bus.start()
        event = events_pb2.JobSubmitted(job_id="j")
        publisher = Publisher(jobs.jetstream())
        await publisher.publish(JOB_SUBMITTED, event, message_id="1", timeout_seconds=20)
        assert (await jobs.jetstream().stream_info(JOBS.name)).state.messages == 1
