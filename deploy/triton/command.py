"""How to start one Triton: its command line, environment, folders and shared memory."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import LOOPBACK, REPOSITORY
from deploy.triton.sandbox import Sandbox, sandbox_of

# How long Triton waits for running requests when it stops; it needs one or two seconds more.
EXIT_TIMEOUT_SECONDS = 2
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the Python backend creates its regions there

_DESCRIBE_INTERPRETER = """
import json, sys, sysconfig
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "base": sys.base_prefix,
    "library_folder": sysconfig.get_config_var("LIBDIR"),
    "library": sysconfig.get_config_var("INSTSONAME"),
}))
"""

_CALL_GUARD = """

import stub_guard

stub_guard.end_with_server()
"""


class TritonUnavailableError(CliError):
    """Triton cannot be started on this machine. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TritonPorts:
    """The ports of one Triton, on the loopback address."""

    grpc: int
    http: int
    metrics: int


@dataclass(frozen=True, kw_only=True)
class TritonCommand:
    """What to execute, the folder that this Triton reads models from, and its sandbox."""

    argv: Sequence[str]
    env: Mapping[str, str]
    model_repository: Path
    sandbox: Sandbox | None


@dataclass(frozen=True, kw_only=True)
class _Interpreter:
    """The Python of the models' environment."""

    bin: Path
    version: str
    base: Path
    library_folder: Path


def command(
    *, home: Path, backend_id: str, ports: TritonPorts, root: Path = REPOSITORY
) -> TritonCommand:
    """Creates the folder `home/triton/<backend_id>` and returns how to start Triton with it.

    Raises:
        TritonUnavailableError: something is not installed.
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
    sandbox = sandbox_of(
        folder,
        readable=[
            *(root / name for name in (".venv-triton", ".venv-models")),
            *(interpreter.base, interpreter.library_folder, Path(__file__).parent),
        ],
        listen_ports=[ports.grpc, ports.http, ports.metrics],
    )
    env = _environment(interpreter)
    return TritonCommand(
        argv=argv,
        env={**env, **sandbox.environment()} if sandbox else env,
        model_repository=repository,
        sandbox=sandbox,
    )


def remove_shared_memory(*, home: Path, backend_id: str) -> None:
    """Removes the shared memory that a killed Triton of this folder left behind."""
    prefix = region_prefix(home.absolute() / "triton" / backend_id)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def region_prefix(folder: Path) -> str:
    """Returns the prefix of the names of the shared memory that a Triton of this folder creates."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return f"headrace_{digest}_"


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
    described = subprocess.run(  # noqa: S603  # the Python of the models' environment
        [python, "-c", _DESCRIBE_INTERPRETER], capture_output=True, check=True, text=True
    )
    facts = json.loads(described.stdout)
    library_folder = Path(facts["library_folder"])
    if not (library_folder / facts["library"]).is_file():
        raise TritonUnavailableError(
            f"Triton needs the shared library of Python {facts['version']}; "
            f"install libpython{facts['version']}, or a Python built with --enable-shared"
        )
    return _Interpreter(
        bin=folder,
        version=facts["version"],
        base=Path(facts["base"]),
        library_folder=library_folder,
    )


def _link_backend(folder: Path, server: Path, interpreter: _Interpreter) -> None:
    stub = server / "python_backend_stubs" / interpreter.version / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonUnavailableError(
            f"this Triton does not support Python {interpreter.version}; run `make install` with "
            "PYTHON set to a Python 3.11 or 3.12"
        )
    backend = server / "backends" / "python"
    guard = Path(__file__).with_name("stub_guard.py")
    for target in (backend / "libtriton_python.so", guard):
        _link(folder / target.name, target)
    _write_launcher(folder / stub.name, stub, interpreter)
    utils = "triton_python_backend_utils.py"
    (folder / utils).write_text(f"{(backend / utils).read_text()}{_CALL_GUARD}")


def _write_launcher(path: Path, stub: Path, interpreter: _Interpreter) -> None:
    """Writes what Triton starts in place of the stub; see `stub_launcher`."""
    launcher = Path(__file__).with_name("stub_launcher.py")
    words = [str(interpreter.bin / "python"), "-IS", str(launcher), str(stub)]
    path.unlink(missing_ok=True)  # earlier versions had a link to the stub itself
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _environment(interpreter: _Interpreter) -> dict[str, str]:
    """Returns an environment without the caller's variables.

    The stub imports packages from the first folder in PATH.
    """
    return {
        "HOME": os.environ.get("HOME", "/"),
        "PATH": f"{interpreter.bin}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(interpreter.library_folder),
        "LANG": "C.UTF-8",
    }
