"""How to start one Triton: its command line, environment, folders and shared memory."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.triton.sandbox import Sandbox, sandbox_of
from libs.addresses import host_and_port, unix_path
from libs.tls import TlsFiles

# How long Triton waits for running requests when it stops; it needs one or two seconds more.
EXIT_TIMEOUT_SECONDS = 2
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the Python backend creates its regions there
# Loading a model runs its code; the others reveal what callers do, or access their memory. A call
# needs this header with the mesh's control key.
CONTROL_PROTOCOLS = ("model-repository", "shared-memory", "statistics", "trace", "logging")
CONTROL_HEADER = "triton-grpc-protocol-headrace-control-key"
_CONTROL_NAME = CONTROL_HEADER.removeprefix("triton-grpc-protocol-")

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
class TritonAddresses:
    """Where one Triton listens. It has no HTTP.

    Attributes:
        grpc: `unix:/path:1`, whose path ends with a number because Triton appends one to every
            address, or `host:port`.
        metrics: the `host:port` that Prometheus reads.
    """

    grpc: str
    metrics: str


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
    *,
    home: Path,
    backend_id: str,
    addresses: TritonAddresses,
    control_key: str,
    tls: TlsFiles | None = None,
    root: Path = REPOSITORY,
) -> TritonCommand:
    """Creates the folder `home/triton/<backend_id>` and returns how to start Triton with it.

    Args:
        home: the mesh's folder.
        backend_id: the name of this Triton.
        addresses: where it listens.
        control_key: the secret of calls of `CONTROL_PROTOCOLS`.
        tls: its certificates, where it listens at a `host:port`.
        root: the folder of the environments.

    Raises:
        TritonUnavailableError: something is not installed.
        ValueError: an address is invalid.
    """
    server = _server_folder(root)
    interpreter = _models_interpreter(root)
    folder = home.absolute() / "triton" / backend_id
    repository = folder / "models"
    repository.mkdir(parents=True, exist_ok=True)
    _link_backend(folder / "backends" / "python", server, interpreter)
    _link(folder / "caches" / "local", server / "caches" / "local")
    grpc_address, grpc_port = addresses.grpc.rsplit(":", 1)
    metrics_host, metrics_port = host_and_port(addresses.metrics)
    options = {
        "id": backend_id,
        "model-repository": repository,
        "backend-directory": folder / "backends",
        "cache-directory": folder / "caches",
        "model-control-mode": "explicit",
        "allow-http": "false",  # it has no way to check who calls
        "grpc-address": grpc_address,
        "grpc-port": grpc_port,
        # Other accounts may read the arguments of a process: this is a second lock, behind the
        # folder of the socket.
        "grpc-restricted-protocol": f"{','.join(CONTROL_PROTOCOLS)}:{_CONTROL_NAME}={control_key}",
        "metrics-address": metrics_host,
        "metrics-port": metrics_port,
        "exit-timeout-secs": EXIT_TIMEOUT_SECONDS,
        "backend-config": f"python,shm-region-prefix-name={region_prefix(folder)}",
    }
    if tls is not None and unix_path(addresses.grpc) is None:
        options |= {
            "grpc-use-ssl-mutual": "true",
            "grpc-server-cert": tls.certificate,
            "grpc-server-key": tls.key,
            "grpc-root-cert": tls.ca,
        }
    argv = [
        str(server / "bin" / "tritonserver"),
        *[f"--{name}={value}" for name, value in options.items()],
        "--disable-auto-complete-config",
    ]
    socket = unix_path(addresses.grpc)
    sandbox = sandbox_of(
        folder,
        readable=[
            *(root / name for name in (".venv-triton", ".venv-models")),
            *(interpreter.base, interpreter.library_folder, Path(__file__).parent),
        ],
        private=[tls.certificate, tls.key, tls.ca] if tls is not None else [],
        sockets=[Path(socket).parent] if socket is not None else [],
        listen_ports=[metrics_port, *([] if socket is not None else [int(grpc_port)])],
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
    user_id = os.geteuid()
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        with suppress(OSError):  # any account may make files and folders of this name
            found = region.lstat()
            if stat.S_ISREG(found.st_mode) and user_id in (0, found.st_uid):
                region.unlink()


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
