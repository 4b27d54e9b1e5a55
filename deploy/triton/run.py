"""Runs Triton, alone and without a container.

`command()` says how to start it. `python -m deploy.triton.run` is what the supervisor starts: a
parent of `tritonserver` that ends with it, ends it in time when asked to, and ends it when one of
its models has crashed. Killed itself, it takes Triton with it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from deploy.errors import CliError
from deploy.triton.stubs import Stubs

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
# Triton itself waits so long for running requests, and one or two seconds more; then it is killed.
EXIT_TIMEOUT_SECONDS = 2
STOP_SECONDS = 4.0
WATCH_SECONDS = 0.5
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where the Python backend keeps its regions

_PR_SET_PDEATHSIG = 1
_ASK_INTERPRETER = """
import json, sys, sysconfig
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "library_folder": sysconfig.get_config_var("LIBDIR"),
    "library": sysconfig.get_config_var("INSTSONAME"),
}))
"""

_CALL_GUARD = """

import stub_guard

stub_guard.end_with_server()
"""


class TritonUnavailableError(CliError):
    """Triton cannot be started here; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TritonPorts:
    """Where one Triton listens, on the loopback."""

    grpc: int
    http: int
    metrics: int


@dataclass(frozen=True, kw_only=True)
class TritonCommand:
    """What to execute, and the folder from which this Triton reads its models."""

    argv: Sequence[str]
    env: Mapping[str, str]
    model_repository: Path


@dataclass(frozen=True, kw_only=True)
class _Interpreter:
    """The Python of the models' environment."""

    bin: Path
    version: str
    library_folder: Path


def command(*, home: Path, backend_id: str, ports: TritonPorts, root: Path = ROOT) -> TritonCommand:
    """Lays out `home/triton/<backend_id>` and returns how to start Triton on it.

    Raises:
        TritonUnavailable: a part is missing.
    """
    server = _server_folder(root)
    interpreter = _models_interpreter(root)
    folder = home.absolute() / "triton" / backend_id
    repository = folder / "models"
    repository.mkdir(parents=True, exist_ok=True)
    _link_backend(folder / "backends" / "python", server, interpreter)
    _link(folder / "caches" / "local", server / "caches" / "local")
    options = {
        "id": backend_id,
        "model-repository": repository,
        "backend-directory": folder / "backends",
        "cache-directory": folder / "caches",
        "model-control-mode": "explicit",
        "http-address": LOOPBACK,
        "http-port": ports.http,
        "grpc-address": LOOPBACK,
        "grpc-port": ports.grpc,
        "metrics-address": LOOPBACK,
        "metrics-port": ports.metrics,
        "exit-timeout-secs": EXIT_TIMEOUT_SECONDS,
        "backend-config": f"python,shm-region-prefix-name={region_prefix(folder)}",
    }
    argv = [
        str(server / "bin" / "tritonserver"),
        *[f"--{name}={value}" for name, value in options.items()],
        "--disable-auto-complete-config",
    ]
    return TritonCommand(argv=argv, env=_environment(interpreter), model_repository=repository)


def remove_shared_memory(*, home: Path, backend_id: str) -> None:
    """Removes the regions that a Triton of this folder left when it was killed."""
    prefix = region_prefix(home.absolute() / "triton" / backend_id)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def region_prefix(folder: Path) -> str:
    """Returns how the names begin of the shared memory that a Triton of this folder takes."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return f"headrace_{digest}_"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `tritonserver` in the foreground and exits as it does."""
    parser = argparse.ArgumentParser(description="Start Triton in the foreground.")
    parser.add_argument("--home", type=Path, default=os.environ.get("HEADRACE_HOME", ".headrace"))
    parser.add_argument("--backend-id", default="triton-0")
    for port in ("grpc", "http", "metrics"):
        parser.add_argument(f"--{port}-port", type=int, required=True)
    given = parser.parse_args(arguments)
    ports = TritonPorts(grpc=given.grpc_port, http=given.http_port, metrics=given.metrics_port)
    try:
        found = command(home=given.home, backend_id=given.backend_id, ports=ports)
    except TritonUnavailableError as error:
        sys.exit(str(error))
    remove_shared_memory(home=given.home, backend_id=given.backend_id)
    _die_with(os.getppid())
    sys.exit(run(found, http_port=ports.http))


def run(started: TritonCommand, *, http_port: int) -> int:
    """Runs Triton until it ends and returns its exit code.

    Call it in the main thread: the kernel ends Triton with the thread that started it.
    """
    parent = os.getpid()
    server = subprocess.Popen(  # noqa: S603  # our own command
        started.argv,
        env=started.env,
        preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509  # there are no other threads yet
    )
    kill_at_seconds = math.inf

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal kill_at_seconds
        server.terminate()
        kill_at_seconds = min(kill_at_seconds, time.monotonic() + STOP_SECONDS)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stubs = Stubs(server_pid=server.pid, http_port=http_port)
    while server.poll() is None:
        crashed = stubs.crashed(wait_seconds=WATCH_SECONDS)
        if crashed:
            print(f"the process of {crashed} has crashed; Triton starts again", flush=True)
        if crashed or time.monotonic() > kill_at_seconds:
            server.kill()
            server.wait()
    return server.returncode


def _server_folder(root: Path) -> Path:
    for folder in sorted((root / ".venv-triton").glob("lib/python3.*/site-packages")):
        server = folder / "pytriton" / "tritonserver"
        if (server / "bin" / "tritonserver").is_file():
            return server
    raise TritonUnavailableError("Triton is not installed; run `make install`")


def _models_interpreter(root: Path) -> _Interpreter:
    folder = root / ".venv-models" / "bin"
    python = folder / "python"
    if not python.exists():
        raise TritonUnavailableError("the models' environment is not installed; run `make install`")
    answer = subprocess.run(  # noqa: S603  # our own interpreter
        [python, "-c", _ASK_INTERPRETER], capture_output=True, check=True, text=True
    )
    told = json.loads(answer.stdout)
    library_folder = Path(told["library_folder"])
    if not (library_folder / told["library"]).is_file():
        raise TritonUnavailableError(
            f"Triton needs the shared library of Python {told['version']}, which is not here; "
            f"install libpython{told['version']}, or a Python built with --enable-shared"
        )
    return _Interpreter(bin=folder, version=told["version"], library_folder=library_folder)


def _link_backend(folder: Path, server: Path, interpreter: _Interpreter) -> None:
    stub = server / "python_backend_stubs" / interpreter.version / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonUnavailableError(f"this Triton has no stub for Python {interpreter.version}")
    backend = server / "backends" / "python"
    guard = ROOT / "deploy" / "triton" / "stub_guard.py"
    for target in (stub, backend / "libtriton_python.so", guard):
        _link(folder / target.name, target)
    utils = "triton_python_backend_utils.py"
    (folder / utils).write_text(f"{(backend / utils).read_text()}{_CALL_GUARD}")


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _environment(interpreter: _Interpreter) -> dict[str, str]:
    """Returns an environment with nothing of the caller's in it.

    The stub takes its packages from the first entry of PATH.
    """
    return {
        "HOME": os.environ.get("HOME", "/"),
        "PATH": f"{interpreter.bin}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(interpreter.library_folder),
        "LANG": "C.UTF-8",
    }


def _die_with(parent: int) -> None:
    """Has the kernel kill this process, whatever it executes, when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


if __name__ == "__main__":
    main()
