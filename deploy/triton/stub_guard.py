"""Ends a model's process (a stub of Triton's Python backend) when its server ends.

A stub whose server was killed would wait for it indefinitely and keep its model in memory. Every
stub imports `triton_python_backend_utils`; `command` adds a line to that module that calls this
one, so that models need no code for it. The kernel's parent death signal cannot be used: it is sent
when the *thread* that started the stub ends, not its process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path

_SERVER_NAME = "tritonserver"


def end_with_server() -> None:
    """Kills this process when its parent, a `tritonserver`, ends, or has ended already."""
    server = os.getppid()
    process = os.pidfd_open(server)
    name = Path(f"/proc/{server}/comm").read_text().strip()
    # If the server ended before the pidfd was opened, another process is the parent now.
    if name != _SERVER_NAME or os.getppid() != server:
        _end()
    threading.Thread(target=_wait, args=(process,), name="stub-guard", daemon=True).start()


def _wait(process: int) -> None:
    select.select([process], [], [])  # a pidfd becomes readable when its process ends
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # nothing needs to be cleaned up
