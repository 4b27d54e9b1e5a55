"""The folder of a mesh, and the settings that select a mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.edge_settings import EdgeSettings

DEFAULT_EDGE_PORT = 8080
# The longest path of a Unix socket on Linux.
SOCKET_PATH_LIMIT_BYTES = 107
REPLICA_LIMIT = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folder and the shape of one mesh.

    Attributes:
        home: the folder of all its state.
        edge_port: the port that the user set for the edge; None: the one it has, or the default.
        inference_replicas: the number of processes that relay tokens; up to one per core is useful.
        triton_backends: the number of Tritons, each with a pool agent, all with the same versions.
        edge: where the edge listens, and for whom.
    """

    home: Path
    edge_port: int | None = None
    inference_replicas: int = 1
    triton_backends: int = 1
    edge: EdgeSettings = field(default_factory=EdgeSettings)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Layout:
        """Reads `HEADRACE_HOME`, the numbers of replicas and the settings of the edge.

        Raises:
            CliError: one of them is invalid.
        """
        home = Path(environment.get("HEADRACE_HOME") or REPOSITORY / ".headrace").resolve()
        port = environment.get("HEADRACE_EDGE_PORT")
        if port and (not port.isdecimal() or not 0 < int(port) < 2**16):
            raise CliError(f"HEADRACE_EDGE_PORT must be a port number, but it is {port!r}")
        layout = cls(
            home=home,
            edge_port=int(port) if port else None,
            inference_replicas=_replica_count(environment, "HEADRACE_INFERENCE_REPLICAS"),
            triton_backends=_replica_count(environment, "HEADRACE_TRITON_BACKENDS"),
            edge=EdgeSettings.of(environment),
        )
        if len(os.fsencode(layout.socket)) > SOCKET_PATH_LIMIT_BYTES:
            raise CliError(
                f"HEADRACE_HOME is too long for a Unix socket in it, choose a shorter path: {home}"
            )
        return layout

    @property
    def run(self) -> Path:
        """The folder of socket, ports and rendered configurations."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """The folder of the logs, one file for each process."""
        return self.home / "logs"

    @property
    def socket(self) -> Path:
        """The socket that the supervisor listens on."""
        return self.run / "supervisor.sock"

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
        """Creates the folders that do not exist yet, readable by their owner only."""
        for folder in (self.home, self.run, self.logs, self.home / "data", self.home / "nats"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _replica_count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "1"
    if not text.isdecimal() or not 0 < int(text) <= REPLICA_LIMIT:
        raise CliError(f"{name} must be a number from 1 to {REPLICA_LIMIT}, but it is {text!r}")
    return int(text)
