"""Starts Triton, alone and without a container.

`command()` says how; `python -m services.cli.triton` becomes it. No launcher stays: the
supervisor's own child is `tritonserver`, which dies with the supervisor.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_SECONDS = 3
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


class TritonUnavailable(Exception):  # noqa: N818  # says what is the matter
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
        "backend-config": f"python,shm-region-prefix-name={_region_prefix(folder)}",
    }
    argv = [
        str(server / "bin" / "tritonserver"),
        *[f"--{name}={value}" for name, value in options.items()],
        "--disable-auto-complete-config",
    ]
    return TritonCommand(argv=argv, env=_environment(interpreter), model_repository=repository)


def remove_shared_memory(*, home: Path, backend_id: str) -> None:
    """Removes the regions that a Triton of this folder left when it was killed."""
    prefix = _region_prefix(home.absolute() / "triton" / backend_id)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes `tritonserver`."""
    parser = argparse.ArgumentParser(description="Start Triton in the foreground.")
    parser.add_argument("--home", type=Path, default=os.environ.get("HEADRACE_HOME", ".headrace"))
    parser.add_argument("--backend-id", default="triton-0")
    for port in ("grpc", "http", "metrics"):
        parser.add_argument(f"--{port}-port", type=int, required=True)
    given = parser.parse_args(arguments)
    ports = TritonPorts(grpc=given.grpc_port, http=given.http_port, metrics=given.metrics_port)
    try:
        found = command(home=given.home, backend_id=given.backend_id, ports=ports)
    except TritonUnavailable as error:
        sys.exit(str(error))
    remove_shared_memory(home=given.home, backend_id=given.backend_id)
    _die_with_parent()
    os.execve(found.argv[0], list(found.argv), dict(found.env))  # noqa: S606  # no shell wanted


def _server_folder(root: Path) -> Path:
    for folder in sorted((root / ".venv-triton").glob("lib/python3.*/site-packages")):
        server = folder / "pytriton" / "tritonserver"
        if (server / "bin" / "tritonserver").is_file():
            return server
    raise TritonUnavailable("Triton is not installed; run `make install`")


def _models_interpreter(root: Path) -> _Interpreter:
    folder = root / ".venv-models" / "bin"
    python = folder / "python"
    if not python.exists():
        raise TritonUnavailable("the models' environment is not installed; run `make install`")
    answer = subprocess.run(  # noqa: S603  # our own interpreter
        [python, "-c", _ASK_INTERPRETER], capture_output=True, check=True, text=True
    )
    told = json.loads(answer.stdout)
    library_folder = Path(told["library_folder"])
    if not (library_folder / told["library"]).is_file():
        raise TritonUnavailable(
            f"Triton needs the shared library of Python {told['version']}, which is not here; "
            f"install libpython{told['version']}, or a Python built with --enable-shared"
        )
    return _Interpreter(bin=folder, version=told["version"], library_folder=library_folder)


def _link_backend(folder: Path, server: Path, interpreter: _Interpreter) -> None:
    stub = server / "python_backend_stubs" / interpreter.version / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonUnavailable(f"this Triton has no stub for Python {interpreter.version}")
    backend = server / "backends" / "python"
    for target in (
        stub,
        backend / "libtriton_python.so",
        backend / "triton_python_backend_utils.py",
    ):
        _link(folder / target.name, target)


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


def _region_prefix(folder: Path) -> str:
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return f"headrace_{digest}_"


def _die_with_parent() -> None:
    """Has the kernel kill this process, whatever it executes, when its parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(1)


if __name__ == "__main__":
    main()
