"""Checks whether this machine can run a mesh, and describes each problem in one line.

Runs before anything is downloaded, on any Python 3: without packages and syntax newer than 3.6.
"""
# ruff: noqa: I002 - `from __future__ import annotations` is a syntax error in Python 3.6

import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

PYTHONS = ("3.11", "3.12")
GLIBC = (2, 35)
INSTALL_DISK_BYTES = 3 * 1024**3
DEFAULT_EDGE_PORT = 8080
PROBE_SECONDS = 20
# A Python built without optimisation takes half as long again. A smaller difference may be noise.
MIN_SPEEDUP = 1.2
TIMED_ROUNDS = 2

_PROBE = """
import json, os, sys, sysconfig, time
try:
    import ensurepip, venv
    has_venv = True
except ImportError:
    has_venv = False
folder, name = (sysconfig.get_config_var(key) or "" for key in ("LIBDIR", "INSTSONAME"))
has_library = ".so" in name and os.path.exists(os.path.join(folder, name))

def work():
    counts = {}
    for number in range(100000):
        key = "%d" % (number % 100)
        counts[key] = counts.get(key, 0) + len(key)

def timed():
    start = time.process_time()
    work()
    return time.process_time() - start

seconds = min(timed() for _ in range(5))
version = "%d.%d" % sys.version_info[:2]
print(json.dumps([sys.executable, version, has_venv, has_library, seconds]))
"""


def platform_problems() -> list:
    """Returns the problems of the operating system."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return [f"it needs Linux on x86-64, but this is {system} on {machine}."]
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        name, version = "", ""
    required = ".".join(str(part) for part in GLIBC)
    if name != "glibc":
        return [f"it needs glibc {required} or newer, but this system has another C library."]
    if tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        return [f"it needs glibc {required} or newer, but this system has {version}."]
    return []


def find_python() -> tuple:
    """Returns the path of a Python that can run the mesh, or None, and the problems.

    It is the first one on the PATH, unless another one is clearly faster: most of the cost of a
    request is the interpreter's.
    """
    chosen = os.environ.get("PYTHON")
    candidates = [chosen] if chosen else _on_path([f"python{v}" for v in PYTHONS] + ["python3"])
    required = " or ".join(PYTHONS)
    problem = f"it needs Python {required}: put one on the PATH, or set PYTHON to its path."
    fitting = {}
    for candidate in candidates:
        found = _probe(candidate)
        if found is None:
            continue
        path, version, has_venv, has_library, seconds = found
        if version not in PYTHONS:
            name = os.path.basename(candidate)  # noqa: PTH119 - Python 3.6
            if (candidate == chosen or name == "python3") and "has no" not in problem:
                problem = f"it needs Python {required}, but {chosen or name} is {version}."
        elif not has_venv:
            problem = f"{path} has no venv module; install it (Debian: python{version}-venv)."
        elif not has_library:
            problem = f"{path} has no shared library; install it (Debian: libpython{version})."
        else:
            fitting[path] = seconds
    if not fitting:
        return None, [problem]
    return _preferred(fitting), []


def _preferred(fitting: dict) -> str:
    """Returns the first of these Pythons, unless another one is clearly faster.

    They are measured in turn, and the best time of each counts: on a busy machine the time of the
    measurement may matter more than the Python.
    """
    first = next(iter(fitting))
    if len(fitting) > 1:
        for path in list(fitting) * TIMED_ROUNDS:
            found = _probe(path)
            if found is not None:
                fitting[path] = min(fitting[path], found[-1])
    fastest = min(fitting, key=fitting.get)
    return fastest if MIN_SPEEDUP * fitting[fastest] < fitting[first] else first


def _on_path(names: list) -> list:
    """Returns all programs of these names, in the order of the names, then of the PATH."""
    found = {}
    for name in names:
        for folder in os.get_exec_path():
            path = os.path.join(folder, name)  # noqa: PTH118 - Python 3.6
            if os.access(path, os.X_OK):
                found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def disk_problems(folder: str) -> list:
    """Returns the problem if there is too little disk space for an installation."""
    free = shutil.disk_usage(folder).free
    if free >= INSTALL_DISK_BYTES:
        return []
    available, required = (f"{size / 1024**3:.1f} GiB" for size in (free, INSTALL_DISK_BYTES))
    return [f"it needs {required} of free disk space, but {folder} has {available}."]


def edge_port_problems(home: Path) -> list:
    """Returns the problem of the edge's port, if any. The mesh of this folder may use it."""
    text = os.environ.get("HEADRACE_EDGE_PORT") or str(DEFAULT_EDGE_PORT)
    if not text.isdigit() or not 0 < int(text) < 2**16:
        return [f"HEADRACE_EDGE_PORT must be a port number, but it is {text!r}."]
    address = (os.environ.get("HEADRACE_EDGE_ADDRESS") or "127.0.0.1").strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(text)))
    except OSError as error:
        if _mesh_is_running(home):
            return []
        reason = error.strerror or error  # `error` where it is not an error of the system
        action = "set HEADRACE_EDGE_PORT or HEADRACE_EDGE_ADDRESS"
        return [f"port {text} of {address} cannot be used ({reason}); {action}."]
    return []


def _mesh_is_running(home: Path) -> bool:
    try:
        pid = int((home / "run/supervisord.pid").read_text())
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return f"HEADRACE_HOME={home}".encode() in environment


def _probe(candidate: str) -> list:
    try:
        out = subprocess.run(  # noqa: S603 - a Python found above
            [candidate, "-c", _PROBE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
            check=True,
        )
        return json.loads(out.stdout.decode())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
