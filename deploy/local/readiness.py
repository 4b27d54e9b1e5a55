"""Checks which processes of a mesh are ready, and waits for them."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.certificates import tls_files
from deploy.errors import CliError
from deploy.local.layout import Layout
from deploy.local.logs import tail
from deploy.local.processes import ProcessSpec
from deploy.local.supervisor import ProcessState, is_running, process_states
from libs.addresses import connect, unix_path
from libs.rpc.channel import channel_credentials
from libs.tls import MESH_NAME, TlsFiles

CHECK_TIMEOUT_SECONDS = 1.0
CHECK_PAUSE_SECONDS = 0.1
# For a loaded machine with a cold disk; usually a start takes a few seconds.
START_TIMEOUT_SECONDS = 180.0
LOG_TAIL_LINES = 15
# A process that ended so often during a start is not waited for any longer.
FAILED_STARTS = 2
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # the timeout of one attempt
    ("grpc.max_reconnect_backoff_ms", 200),
]


def sync_channel(layout: Layout, address: str) -> grpc.Channel:
    """Opens a blocking channel to a process of the mesh, as the operator.

    Raises:
        OSError: the mesh has no certificates.
    """
    if unix_path(address) is not None:
        return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return grpc.secure_channel(
        address,
        channel_credentials(tls_files(layout.home, "operator")),
        options=[*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", MESH_NAME)],
    )


class Probe:
    """Checks whether one process is ready. Use it in a `with`."""

    def __init__(self, layout: Layout, process: ProcessSpec) -> None:
        self.name = process.name
        self._tls = tls_files(layout.home, "operator")
        self._health = process.health
        self._channel = None
        if not self._health.startswith(("http:", "http+unix:", "nats:")):
            self._channel = sync_channel(layout, self._health)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._channel is not None:
            self._channel.close()

    def is_ready(self) -> bool:
        """Returns whether the process accepts work now."""
        if self._channel is None:
            if self._health.startswith("http:"):
                return _answers_200(self._health)
            if self._health.startswith("nats:"):
                return _nats_greets(self._health, self._tls)
            return _answers_200_on_socket(self._health)
        try:
            answer = health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_SECONDS
            )
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def wait_until_ready(
    layout: Layout, processes: Sequence[ProcessSpec], *, on_ready: Callable[[str], None]
) -> None:
    """Returns when all processes are ready. Calls `on_ready` with each as it becomes ready.

    Raises:
        CliError: one ended `FAILED_STARTS` times, or it takes too long. The message has the end of
            its log.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    failures = StartFailures()
    waiting = {process.name: Probe(layout, process) for process in processes}
    while waiting:
        for name in [name for name, probe in waiting.items() if probe.is_ready()]:
            with waiting.pop(name):
                on_ready(name)
        if not waiting:
            return
        states = process_states(layout)
        if not states and not is_running(layout):
            raise CliError(_not_ready_message(layout, ["supervisord"]))
        failed = [name for name in failures.update(states.values()) if name in waiting]
        if failed or time.monotonic() > deadline:
            raise CliError(_not_ready_message(layout, failed or list(waiting)))
        time.sleep(CHECK_PAUSE_SECONDS)


class StartFailures:
    """Counts how often processes ended while they were waited for.

    None ends because another one is not ready yet, so one that ends again has a problem that
    waiting does not solve: a wrong setting, an invalid file.
    """

    def __init__(self) -> None:
        self._pids: dict[str, set[int]] = {}

    def update(self, states: Iterable[ProcessState]) -> list[str]:
        """Takes the current states and returns the names of processes that have failed."""
        failed = []
        for state in states:
            pids = self._pids.setdefault(state.name, set())
            if state.pid:
                pids.add(state.pid)
            ended = len(pids) - bool(state.pid)
            if state.state == "FATAL" or ended >= FAILED_STARTS:
                failed.append(state.name)
        return failed


def _answers_200(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=CHECK_TIMEOUT_SECONDS) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)  # noqa: PLR2004 - HTTP's OK
    except (OSError, urllib.error.URLError):
        return False


def _answers_200_on_socket(url: str) -> bool:
    """Asks a server on a Unix socket, `http+unix:/socket#/path`."""
    path, _, target = url.removeprefix("http+unix:").partition("#")
    connection = http.client.HTTPConnection("localhost", timeout=CHECK_TIMEOUT_SECONDS)
    try:
        connection.sock = connect(f"unix:{path}", timeout_seconds=CHECK_TIMEOUT_SECONDS)
        connection.request("GET", target)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _nats_greets(url: str, tls: TlsFiles) -> bool:
    """Reads what a NATS server sends first, which needs no password. JetStream runs by then."""
    address = url.removeprefix("nats://")
    try:
        with (
            connect(address, timeout_seconds=CHECK_TIMEOUT_SECONDS) as connection,
            tls.client_context().wrap_socket(connection, server_hostname=MESH_NAME) as secure,
        ):
            return secure.recv(4).startswith(b"INFO")
    except OSError:
        return False


def _not_ready_message(layout: Layout, names: Sequence[str]) -> str:
    logs = (f"--- {name}\n{tail(layout.logs / f'{name}.log', LOG_TAIL_LINES)}" for name in names)
    return "\n".join(
        [
            f"not ready: {', '.join(names)}. The last lines of the logs:",
            *logs,
            "--- `headrace down` stops what was started",
        ]
    )
