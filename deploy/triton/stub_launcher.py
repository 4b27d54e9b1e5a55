"""Restricts the process of one model further than Triton, and becomes Triton's stub.

`python -IS stub_launcher.py STUB ARGUMENT…`, started by Triton in place of the stub. It runs before
any code of the model. It has the standard library only: it is the models' Python, without packages.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import confinement

_POLICY = "HEADRACE_STUB_POLICY"
_PORT = "HEADRACE_ENGINE_PORT"
# All models of this Triton may write to the folder: a link must not be followed, a pipe not waited
# for.
_LOCK_FLAGS = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def main() -> None:
    """Enters the sandbox and executes the stub."""
    stub, *arguments = sys.argv[1:]
    policy = json.loads(os.environ.pop(_POLICY, "null"))
    if policy is not None:
        confinement.drop_new_privileges()
        port = _reserve_port(policy["engine_ports"], Path(policy["scratch"]))
        os.environ[_PORT] = str(port)
        confinement.restrict_files(
            readable=map(Path, policy["readable"]),
            writable=map(Path, policy["writable"]),
            listen_ports=[port],
            connect_ports=[port],
            keeps_signals=False,  # a stub asks by a signal whether Triton still lives
        )
        if confinement.seccomp_is_available():
            confinement.deny_sockets_and_calls()
    os.execv(stub, [stub, *arguments])  # noqa: S606  # Triton's own


def _reserve_port(ports: list[int], scratch: Path) -> int:
    """Returns a port that no other process of a model has, for as long as this process lives.

    Raises:
        SystemExit: there is none: more models are loaded than there are ports.
    """
    for port in ports:
        try:
            lock = os.open(scratch / f"engine-{port}.lock", _LOCK_FLAGS, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)  # the stub keeps it
        return port
    sys.exit("no port is left for the engine of another model")


if __name__ == "__main__":
    main()
