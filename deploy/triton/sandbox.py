"""Runs Triton, and the code of models in it, without sight of the rest of the machine.

Models are code that people upload. In the sandbox they read system libraries, the environments and
the folder of their own Triton; they write to a folder for temporary files; they listen at Triton's
own ports and connect to their own engine's. So they see neither keys nor data, other backends or
the mesh's sockets, and reach no service of the mesh and no network. Two sandboxes are nested:

* `Sandbox.enter`, for Triton: Landlock, and another user if root starts the mesh;
* `stub_launcher.py`, for each process of a model: one port, no Unix sockets (Landlock does not
  cover those with a path), and none of the calls that reach into other processes (seccomp).

What holds where is said by `layers`; `headrace up` warns if something is missing.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import LOOPBACK
from deploy.triton import confinement
from deploy.triton.removal import remove_folder

MODE_VARIABLE = "HEADRACE_TRITON_SANDBOX"
USER_VARIABLE = "HEADRACE_TRITON_USER"
# For the stub launcher, in Triton's environment.
POLICY_VARIABLE = "HEADRACE_STUB_POLICY"

# Each Triton has a user of its own, this one and those that follow; no account should have them.
DEFAULT_USER_ID = 65300
MAX_BACKENDS = 200
# Each process of a model may have an engine that listens at one of these many ports.
ENGINE_PORTS = 32

# Files that programs read on any Linux. Not all of /etc: it has secrets.
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc"),
    *("/sys/devices", "/sys/bus", "/sys/class", "/sys/fs/cgroup", "/sys/module"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf"),
    *("/etc/resolv.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols", "/etc/alternatives"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)
_DEVICES = ("/dev/null", "/dev/full", "/dev/shm", "/dev/dri", "/dev/kfd")  # noqa: S108  # shared memory
# Here Triton's Python backend makes an empty folder when it starts, whatever TMPDIR is.
_PYTHON_BACKENDS_FOLDER = Path("/tmp")  # noqa: S108
_DEVICE_PATTERNS = ("nvidia*", "nvidia-caps")


class SandboxError(CliError):
    """The sandbox that is required cannot be made on this machine."""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """The sandbox of one Triton.

    Attributes:
        folder: of this Triton; readable.
        scratch: its `HOME` and folder for temporary files; writable.
        readable: files and folders, with those of the system.
        private: files that Triton reads and models do not.
        sockets: folders of its Unix sockets; writable.
        listen_ports: Triton's own TCP ports.
        engine_ports: TCP ports for engines.
        user_id: to become; None: the user stays.
        restricts_files: whether the kernel has Landlock.
    """

    folder: Path
    scratch: Path
    readable: Sequence[Path]
    private: Sequence[Path]
    sockets: Sequence[Path]
    listen_ports: Sequence[int]
    engine_ports: Sequence[int]
    user_id: int | None
    restricts_files: bool

    def environment(self) -> Mapping[str, str]:
        """Returns variables for Triton."""
        policy = {
            "engine_ports": list(self.engine_ports),
            "scratch": str(self.scratch),
            "readable": [str(path) for path in self.readable],
            "writable": [*_DEVICES, str(self.scratch), *map(str, _gpu_devices())],
        }
        return {
            "HOME": str(self.scratch),
            "TMPDIR": str(self.scratch),
            POLICY_VARIABLE: json.dumps(policy),
        }

    def prepare(self) -> None:
        """Empties the folder for temporary files, and makes what Triton writes to its own.

        Called by its parent, before each start.
        """
        # What a model left may not be removable: it must not stop this start.
        old = f"{self.scratch.name}.old-"
        with suppress(FileNotFoundError):
            self.scratch.rename(self.scratch.with_name(f"{old}{secrets.token_hex(8)}"))
        self.scratch.mkdir(mode=0o700)
        for path in self.folder.glob(f"{old}*"):
            remove_folder(path)
        if self.user_id is not None:
            for path in (self.scratch, *self.sockets):
                os.chown(path, self.user_id, self.user_id)

    def remove_leftovers(self, known: Collection[Path]) -> None:
        """Removes the folders that this user's Tritons have made since those known were there."""
        user_id = os.geteuid() if self.user_id is None else self.user_id
        for folder in self.leftovers() - set(known):
            with suppress(OSError):  # another process was faster, or it is not empty
                if folder.stat().st_uid == user_id:
                    folder.rmdir()

    def leftovers(self) -> set[Path]:
        """Returns the empty folders that Tritons make and, in the sandbox, cannot remove."""
        return set(_PYTHON_BACKENDS_FOLDER.glob("python_env_*"))

    def enter(self) -> None:
        """Restricts this process and its children; it cannot be undone.

        Raises:
            ConfinementError: the kernel refuses.
        """
        confinement.drop_new_privileges()
        if self.user_id is not None:
            confinement.become(self.user_id, keep_reading=self.restricts_files)
        if self.restricts_files:
            confinement.restrict_files(
                readable=[*self.readable, *self.private],
                writable=[*map(Path, _DEVICES), *_gpu_devices(), self.scratch, *self.sockets],
                makes_folders=[_PYTHON_BACKENDS_FOLDER],
                listen_ports=[*self.listen_ports, *self.engine_ports],
                connect_ports=self.engine_ports,
            )


def sandbox_of(
    folder: Path,
    *,
    readable: Sequence[Path],
    private: Sequence[Path] = (),
    sockets: Sequence[Path] = (),
    listen_ports: Sequence[int],
    environment: Mapping[str, str] | None = None,
) -> Sandbox | None:
    """Returns the sandbox of a Triton, and makes its folders; None: there is none.

    Args:
        folder: of this Triton.
        readable: what else it reads: its programs and environments.
        private: what it reads and models do not.
        sockets: folders in which it makes its Unix sockets; nothing else may be in them.
        listen_ports: its TCP ports.
        environment: has the settings.

    Raises:
        SandboxError: it is required and cannot be made, or a setting is invalid.
    """
    environment = os.environ if environment is None else environment
    mode = environment.get(MODE_VARIABLE, "on")
    if mode not in ("on", "required", "off"):
        raise SandboxError(f"{MODE_VARIABLE} must be on, required or off, and not {mode!r}")
    if mode == "off":
        return None
    if mode == "required":
        _require_layers()
    has_landlock = confinement.landlock_version() > 0
    if not has_landlock:
        return None
    scratch = folder / "tmp"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in sockets:
        if folder.is_relative_to(each):
            raise SandboxError(
                f"{each} contains more than the sockets of {folder.name}; use another folder"
            )
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Sandbox(
        folder=folder,
        scratch=scratch,
        readable=[*map(Path, _SYSTEM), folder, *readable],
        private=private,
        sockets=sockets,
        listen_ports=listen_ports,
        engine_ports=_free_ports(ENGINE_PORTS),
        user_id=_user_id(folder.name, environment) if os.geteuid() == 0 else None,
        restricts_files=has_landlock,
    )


def layers() -> Mapping[str, bool]:
    """Returns the parts of the sandbox, and whether this machine and the settings have them."""
    found = _layers_of_kernel()
    is_on = os.environ.get(MODE_VARIABLE, "on") != "off"
    return {name: is_on and has for name, has in found.items()}


def _require_layers() -> None:
    found = _layers_of_kernel()
    missing = _missing(found)
    if not found["files"]:
        raise SandboxError(
            f"{MODE_VARIABLE} is required, but this kernel has no Landlock (Linux 5.13 with "
            "landlock in the boot parameter lsm=)"
        )
    if missing:
        raise SandboxError(
            f"{MODE_VARIABLE} is required, but this machine lacks a part of it: "
            f"{', '.join(missing)} (Linux 6.12 on x86-64 has all)"
        )


def _layers_of_kernel() -> Mapping[str, bool]:
    version = confinement.landlock_version()
    return {
        "files": version > 0,
        "tcp": version >= confinement.TCP_VERSION,
        "signals": version >= confinement.SCOPE_VERSION,
        "unix_sockets": version > 0 and confinement.seccomp_is_available(),
        "user": version > 0 and os.geteuid() == 0,
    }


def warning() -> str:
    """Returns what a user should know about the sandbox; empty: all of it is there."""
    found = layers()
    if not found["files"]:
        return (
            "models run without a sandbox: they can read this user's files, also the mesh's keys "
            "(Landlock is off or not in this kernel); deploy only models that you trust"
        )
    missing = _missing(found)
    if missing:
        return (
            f"the sandbox of models is not complete on this kernel, without: {', '.join(missing)}"
        )
    return ""


def _missing(found: Mapping[str, bool]) -> list[str]:
    """Returns the layers that a kernel lacks; the user is a matter of who starts the mesh."""
    return [name for name, has in found.items() if not has and name != "user"]


def _user_id(backend_id: str, environment: Mapping[str, str]) -> int:
    """Returns the user of a backend, such as of `triton-3`."""
    text = environment.get(USER_VARIABLE, str(DEFAULT_USER_ID))
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise SandboxError(
            f"{USER_VARIABLE} must be the number of an unused user, and not {text!r}"
        )
    number = backend_id.rpartition("-")[2]
    user_id = int(text) + (int(number) % MAX_BACKENDS if number.isdecimal() else 0)
    try:
        name = pwd.getpwuid(user_id).pw_name
    except KeyError:
        return user_id
    raise SandboxError(
        f"the user {user_id} for {backend_id} is {name}, an account of this machine; set "
        f"{USER_VARIABLE} to the first of {MAX_BACKENDS} unused numbers"
    )


def _gpu_devices() -> list[Path]:
    return [path for pattern in _DEVICE_PATTERNS for path in Path("/dev").glob(pattern)]


def _free_ports(count: int) -> list[int]:
    held = []
    try:
        for _ in range(count):
            held.append(socket.socket())
            held[-1].bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
