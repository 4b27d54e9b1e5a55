"""A service process has its memory and gRPC settings, however it is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from libs.runtime import GRPC_EXPERIMENTS, MAX_HEAPS

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/__main__.py"))

# Imports a service's `__main__`, as `python -m` does, and reports what gRPC found in the
# environment when it was imported, and how many heaps ten threads that allocate make.
_IMPORT_AND_REPORT = """
import ctypes, importlib, json, os, sys, tempfile, threading

seen = {}

class Observer:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            seen["experiments"] = os.environ.get("GRPC_EXPERIMENTS")

sys.meta_path.insert(0, Observer())
importlib.import_module(f"services.{sys.argv[1]}.__main__")

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
barrier, end = threading.Barrier(11), threading.Event()

def allocate():
    libc.malloc(1000)
    barrier.wait()
    end.wait()

for _ in range(10):
    threading.Thread(target=allocate).start()
barrier.wait()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    seen["heaps"] = open(file.name).read().count("<heap nr=")
end.set()
print(json.dumps(seen))
"""

# Sends one RPC to itself and prints gRPC's trace of its sockets.
_CALL_AND_TRACE = """
from libs.runtime import prepare
prepare(streams_tokens=True)
import concurrent.futures, grpc
server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    grpc.channel_ready_future(channel).result(20)
server.stop(None)
"""


def _python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def _report(service: str, **environment: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(_python(_IMPORT_AND_REPORT, service, **environment).stdout)
    return report


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_makes_its_own_settings(service: str):
    """All services limit their heaps; inference, which streams tokens, disables the event engine.

    Both need no variable of a supervisor, and gRPC finds its setting when it is imported.
    """
    report = _report(service)

    assert report["heaps"] <= MAX_HEAPS
    expected = GRPC_EXPERIMENTS if service == "inference" else None
    assert report["experiments"] == expected


def test_settings_of_the_user_are_kept():
    """Both can be disabled to find a fault."""
    report = _report("inference", MALLOC_ARENA_MAX="6", GRPC_EXPERIMENTS="")

    assert report["heaps"] > MAX_HEAPS
    assert report["experiments"] == ""


def test_the_setting_of_grpc_has_an_effect():
    """Another version of gRPC may ignore it: the trace shows which implementation runs."""
    trace = _python(_CALL_AND_TRACE, GRPC_VERBOSITY="DEBUG", GRPC_TRACE="tcp,event_engine").stderr

    assert "tcp_posix.cc" in trace
    assert "posix_endpoint.cc" not in trace
