"""Where a mesh keeps its state, and which one is meant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY

DEFAULT_EDGE_PORT = 8080
# A Unix socket's path has at most 107 bytes on Linux.
SOCKET_PATH_LIMIT_BYTES = 107
REPLICA_LIMIT = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One mesh: its folder, from which everything else follows.

    Attributes:
        edge_port: the port that the user wants for the edge; None: the one it has, or the default.
        inference_replicas: how many processes relay tokens; about one a core pays.
        triton_backends: how many Tritons, each with an agent, all with the same versions.
    """

    home: Path
    edge_port: int | None = None
    inference_replicas: int = 1
    triton_backends: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Layout:
        """Reads `HEADRACE_HOME` and `HEADRACE_EDGE_PORT`.

        Raises:
            CannotRun: one of them cannot be used.
        """
        home = Path(environment.get("HEADRACE_HOME") or REPOSITORY / ".headrace").resolve()
        port = environment.get("HEADRACE_EDGE_PORT")
        if port and (not port.isdecimal() or not 0 < int(port) < 2**16):
            raise CliError(f"HEADRACE_EDGE_PORT must be a port number, and it is {port!r}")
        layout = cls(
            home=home,
            edge_port=int(port) if port else None,
            inference_replicas=_count(environment, "HEADRACE_INFERENCE_REPLICAS"),
            triton_backends=_count(environment, "HEADRACE_TRITON_BACKENDS"),
        )
        if len(os.fsencode(layout.socket)) > SOCKET_PATH_LIMIT_BYTES:
            raise CliError(f"HEADRACE_HOME is too long for a socket in it: {home}")
        return layout

    @property
    def run(self) -> Path:
        """What belongs to the running mesh: socket, ports, rendered configurations."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.home / "logs"

    @property
    def socket(self) -> Path:
        """Where the supervisor listens."""
        return self.run / "supervisor.sock"

    @property
    def ports_file(self) -> Path:
        """The ports of the mesh."""
        return self.run / "ports.json"

    @property
    def session_file(self) -> Path:
        """The session that all processes of the mesh belong to."""
        return self.run / "session.json"

    def make_folders(self) -> None:
        """Makes the folders that do not exist yet; other users cannot look into them."""
        for folder in (self.home, self.run, self.logs, self.home / "data", self.home / "nats"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "1"
    if not text.isdecimal() or not 0 < int(text) <= REPLICA_LIMIT:
        raise CliError(f"{name} must be from 1 to {REPLICA_LIMIT}, and it is {text!r}")
    return int(text)
