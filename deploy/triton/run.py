"""Runs Triton as the child of a small process, which the supervisor starts.

`python -m deploy.triton.run` starts `tritonserver` and ends when it ends. It stops Triton within a
bounded time, and kills it when the process of a model has crashed. If this process is killed, the
kernel kills Triton.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from deploy.errors import CliError
from deploy.triton.command import (
    TritonAddresses,
    TritonCommand,
    command,
    remove_shared_memory,
)
from deploy.triton.confinement import ConfinementError
from deploy.triton.log_filter import forward
from deploy.triton.private_memory import keep_memory_private
from deploy.triton.sandbox import Sandbox
from deploy.triton.stubs import Stubs
from libs.tls import TlsFiles

# After SIGTERM Triton is killed if it has not ended by then.
STOP_SECONDS = 4.0
WATCH_SECONDS = 0.5
LOG_SECONDS = 0.5

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `tritonserver` in the foreground and exits with its status."""
    parser = argparse.ArgumentParser(description="Start Triton in the foreground.")
    parser.add_argument("--home", type=Path, default=os.environ.get("HEADRACE_HOME", ".headrace"))
    parser.add_argument("--backend-id", default="triton-0")
    parser.add_argument("--grpc-address", required=True, help="unix:/path:1 or host:port")
    parser.add_argument("--metrics-address", required=True, help="host:port")
    parser.add_argument("--control-key-file", type=Path, required=True)
    parser.add_argument("--tls-folder", type=Path, help="certificates, for a host:port")
    given = parser.parse_args(arguments)
    # Triton itself, which runs models, has a certificate that no service accepts of a client.
    server_tls = TlsFiles.in_folder(given.tls_folder, "triton") if given.tls_folder else None
    client_tls = TlsFiles.in_folder(given.tls_folder, "pool_agent") if given.tls_folder else None
    addresses = TritonAddresses(grpc=given.grpc_address, metrics=given.metrics_address)
    try:
        triton = command(
            home=given.home,
            backend_id=given.backend_id,
            addresses=addresses,
            control_key=given.control_key_file.read_text(),
            tls=server_tls,
        )
    except (CliError, OSError, ValueError) as error:
        sys.exit(str(error))
    remove_shared_memory(home=given.home, backend_id=given.backend_id)
    _die_with(os.getppid())
    sys.exit(run(triton, address=addresses.grpc, tls=client_tls))


def run(triton: TritonCommand, *, address: str, tls: TlsFiles | None = None) -> int:
    """Runs Triton until it ends and returns its exit status.

    Call it in the main thread: the kernel kills Triton when the thread that started it ends.
    """
    parent = os.getpid()
    leftovers: set[Path] = set()
    if triton.sandbox is not None:
        triton.sandbox.prepare()
        leftovers = triton.sandbox.leftovers()
    server = subprocess.Popen(  # noqa: S603  # the tritonserver of our environment
        triton.argv,
        env=triton.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _prepare(triton.sandbox, parent),  # noqa: PLW1509  # there are no other threads yet
    )
    assert server.stdout is not None  # noqa: S101  # it is a pipe
    log = threading.Thread(
        target=forward, args=(server.stdout, sys.stdout.buffer), name="log", daemon=True
    )
    log.start()
    kill_at_seconds = math.inf

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal kill_at_seconds
        server.terminate()
        kill_at_seconds = min(kill_at_seconds, time.monotonic() + STOP_SECONDS)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stubs = Stubs(server_pid=server.pid, address=address, tls=tls)
    while server.poll() is None:
        crashed = stubs.crashed(wait_seconds=WATCH_SECONDS)
        if crashed:
            print(f"the process of model {crashed} has crashed; restarting Triton", flush=True)
        if crashed or time.monotonic() > kill_at_seconds:
            server.kill()
            server.wait()
    log.join(LOG_SECONDS)  # a model's process may still hold the pipe
    if triton.sandbox is not None:
        triton.sandbox.remove_leftovers(leftovers)
    return server.returncode


def _prepare(sandbox: Sandbox | None, parent: int) -> None:
    """Runs in the process that becomes Triton."""
    try:
        if sandbox is not None:
            sandbox.enter()
        keep_memory_private()
    except (OSError, ConfinementError) as error:  # what is raised here does not reach the parent
        print(f"Triton cannot start: {error}", flush=True)
        raise
    _die_with(parent)  # behind the change of the user, which would undo it


def _die_with(parent: int) -> None:
    """Makes the kernel kill this process, also after an `exec`, when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


if __name__ == "__main__":
    main()
