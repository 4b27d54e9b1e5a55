"""Watches the processes in which Triton's Python backend runs models, its stubs.

When a stub crashes, Triton still reports its model as ready, answers new requests with an error and
never ends the streams that were running in the stub. Only a restart of Triton ends those.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, StreamEnded, StreamReset
from h2.exceptions import H2Error

from libs.addresses import connect, unix_path
from libs.tls import MESH_NAME, TlsFiles

_STUB = "triton_python_backend_stub"
_READY_TIMEOUT_SECONDS = 0.5
_PREFIX = struct.Struct(">BI")  # of a message in gRPC: the compressed flag, and the length
_READY = b"\x08\x01"  # a ModelReadyResponse: the field `ready` is true
_READ_BYTES = 65_536
_REAP_SECONDS = 0.1  # for Triton to wait for the process
_STATE, _EXIT_CODE = 0, 49  # fields of /proc/PID/stat, counted after the name


@dataclass(frozen=True)
class _Stub:
    pid: int
    process: int  # a pidfd
    model: str


class Stubs:
    """The stubs of one server. Call `crashed` in a loop: it waits for a stub to end."""

    def __init__(self, *, server_pid: int, address: str, tls: TlsFiles | None = None) -> None:
        """Watches the stubs of a server, whose gRPC address is for questions about its models."""
        self._tls = tls
        self._server_pid = server_pid
        self._address = address
        self._known: dict[int, _Stub] = {}

    def crashed(self, *, wait_seconds: float) -> str:
        """Returns the model whose stub has crashed, or an empty string after `wait_seconds`.

        Triton waits for a stub that it unloads or that fails while it loads. If a stub stays a
        zombie while its model is reported as ready, Triton has not noticed the crash.
        """
        self._find_new()
        watched = select.poll()
        for stub in self._known.values():
            watched.register(stub.process, select.POLLIN)
        ended = {process for process, _ in watched.poll(wait_seconds * 1000)}
        for stub in [stub for stub in self._known.values() if stub.process in ended]:
            if not _is_failed_zombie(stub.pid):
                os.close(stub.process)
                del self._known[stub.pid]
            elif self._is_reported_ready(stub.model):
                return stub.model
            else:
                time.sleep(_REAP_SECONDS)
        return ""

    def _find_new(self) -> None:
        for task in Path(f"/proc/{self._server_pid}/task").glob("*/children"):
            try:
                pids = [int(pid) for pid in task.read_text().split()]
            except OSError:  # the thread has ended
                continue
            for pid in pids:
                if pid not in self._known:
                    self._add(pid)

    def _add(self, pid: int) -> None:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if Path(words[0]).name == _STUB:
                # .../MODEL/VERSION/model.py
                self._known[pid] = _Stub(pid, os.pidfd_open(pid), Path(words[1]).parts[-3])
        except OSError:  # it has ended
            return

    def _is_reported_ready(self, model: str) -> bool:
        try:
            with _connect(self._address, self._tls) as connection:
                return _ask_ready(connection, model)
        except (OSError, ValueError, H2Error):
            return False


def _connect(address: str, tls: TlsFiles | None) -> socket.socket:
    connection = connect(address, timeout_seconds=_READY_TIMEOUT_SECONDS)
    if tls is None or unix_path(address) is not None:
        return connection
    return tls.client_context("h2").wrap_socket(connection, server_hostname=MESH_NAME)


def _ask_ready(connection: socket.socket, model: str) -> bool:
    """Calls `ModelReady`. gRPC's own client takes 20 MB, threads, and seconds to be imported.

    Raises:
        OSError: the connection broke.
        H2Error: what came is not HTTP/2.
    """
    name = model.encode()
    size = len(name)
    message = bytes([0x0A, size & 0x7F | 0x80, size >> 7]) + name  # the field `name`
    protocol = H2Connection(H2Configuration(header_encoding=None))
    protocol.initiate_connection()
    protocol.send_headers(
        1,
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/inference.GRPCInferenceService/ModelReady"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ],
    )
    protocol.send_data(1, _PREFIX.pack(0, len(message)) + message, end_stream=True)
    answer = b""
    while True:
        connection.sendall(protocol.data_to_send())
        data = connection.recv(_READ_BYTES)
        for event in protocol.receive_data(data) if data else [ConnectionTerminated()]:
            if isinstance(event, DataReceived):
                answer += event.data
            elif isinstance(event, StreamEnded):
                return answer[_PREFIX.size :] == _READY
            elif isinstance(event, StreamReset | ConnectionTerminated):
                return False


def _is_failed_zombie(pid: int) -> bool:
    """Returns whether a process has failed and its parent has not read its exit status."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    fields = text[text.rindex(")") + 2 :].split()
    return fields[_STATE] == "Z" and fields[_EXIT_CODE] != "0"
