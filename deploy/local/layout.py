"""The folders of a mesh, and the settings that select a mesh."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.edge_settings import EdgeSettings

DEFAULT_EDGE_PORT = 8080
# The longest path of a Unix socket on Linux.
SOCKET_PATH_LIMIT_BYTES = 107
_LONGEST_SOCKET = "embedding_cache.grpc"
# Other characters have a meaning in gRPC's addresses.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@ -]+")
_SHORT_FOLDERS = Path("/tmp")  # noqa: S108 - `private_folder` checks what is in it
# Folders in a mesh's folder; no other account may enter them.
_PRIVATE = ("run", "logs", "data", "nats", "keys", "secrets", "artifacts", "triton", "cache")
REPLICA_LIMIT = 64
TRANSPORTS = ("unix", "tls")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folder and the shape of one mesh.

    Attributes:
        home: the folder of all its state.
        edge_port: the port that the user set for the edge; None: the one it has, or the default.
        inference_replicas: the number of processes that relay tokens; up to one per core is useful.
        triton_backends: the number of Tritons, each with a pool agent, all with the same versions.
        transport: how processes reach each other: `unix`, over sockets, or `tls`, over loopback
            ports, as between machines.
        edge: where the edge listens, and for whom.
    """

    home: Path
    edge_port: int | None = None
    inference_replicas: int = 1
    triton_backends: int = 1
    transport: str = "unix"
    edge: EdgeSettings = field(default_factory=EdgeSettings)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Layout:
        """Reads `HEADRACE_HOME`, `_TRANSPORT`, numbers of replicas and settings of the edge.

        Raises:
            CliError: one of them is invalid.
        """
        home = (
            Path(environment.get("HEADRACE_HOME") or REPOSITORY / ".headrace")
            .expanduser()
            .resolve()
        )
        port = environment.get("HEADRACE_EDGE_PORT")
        if port and (not port.isdecimal() or not 0 < int(port) < 2**16):
            raise CliError(f"HEADRACE_EDGE_PORT must be a port number, but it is {port!r}")
        transport = environment.get("HEADRACE_TRANSPORT") or "unix"
        if transport not in TRANSPORTS:
            raise CliError(f"HEADRACE_TRANSPORT must be unix or tls, but it is {transport!r}")
        return cls(
            home=home,
            edge_port=int(port) if port else None,
            inference_replicas=_replica_count(environment, "HEADRACE_INFERENCE_REPLICAS"),
            triton_backends=_replica_count(environment, "HEADRACE_TRITON_BACKENDS"),
            transport=transport,
            edge=EdgeSettings.of(environment),
        )

    @property
    def run(self) -> Path:
        """The folder of sockets, ports and rendered configurations."""
        return self.home / "run"

    @property
    def sockets(self) -> Path:
        """The folder of the Unix sockets: `run`.

        Where the path of the mesh is too long for sockets, or has unusual characters, it is a
        folder with a short name in /tmp. It does not depend on variables of the environment, so
        that every command finds it.
        """
        longest = os.fsencode(self.run / _LONGEST_SOCKET)
        if len(longest) <= SOCKET_PATH_LIMIT_BYTES and _PLAIN_PATH.fullmatch(str(self.run)):
            return self.run
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return _SHORT_FOLDERS / f"headrace-{os.geteuid()}-{digest}"

    @property
    def logs(self) -> Path:
        """The folder of the logs, one file for each process."""
        return self.home / "logs"

    @property
    def socket(self) -> Path:
        """The socket that the supervisor listens on."""
        return self.sockets / "supervisor.sock"

    @property
    def edge_file(self) -> Path:
        """The file that says how to call the edge."""
        return self.run / "edge.json"

    @property
    def edge_tls(self) -> Path:
        """The folder of the copies of the edge's certificate."""
        return self.run / "tls"

    @property
    def ports_file(self) -> Path:
        """The file of the ports of the mesh."""
        return self.run / "ports.json"

    @property
    def session_file(self) -> Path:
        """The file that names the session of all processes of the mesh."""
        return self.run / "session.json"

    def make_folders(self) -> None:
        """Creates the folders that do not exist yet, and keeps other accounts out of all of them.

        Raises:
            CliError: another account owns one of them, or may replace them.
        """
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.home.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CliError(
                f"other accounts may change {self.home}; run chmod go-w on it, or set "
                "HEADRACE_HOME to another folder"
            )
        _check_owner(self.home)
        for name in _PRIVATE:
            private_folder(self.home / name)
        private_folder(self.sockets)


def private_folder(folder: Path) -> None:
    """Creates a folder that only this account may enter; one that exists is made so.

    Raises:
        CliError: another account owns it, or it is a link or a file.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(folder)
        folder.chmod(0o700)
    except OSError as error:
        raise CliError(f"cannot create {folder}: {error.strerror}; remove what is there") from error


def _check_owner(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CliError(f"{folder} must be a folder, not a link or a file; remove it")
    if status.st_uid != os.geteuid():
        raise CliError(
            f"{folder} belongs to another account (uid {status.st_uid}), which could read or "
            "replace what is in it; remove it, or set HEADRACE_HOME to another folder"
        )


def _replica_count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "1"
    if not text.isdecimal() or not 0 < int(text) <= REPLICA_LIMIT:
        raise CliError(f"{name} must be a number from 1 to {REPLICA_LIMIT}, but it is {text!r}")
    return int(text)
