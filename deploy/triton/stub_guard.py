"""Ends a stub of Triton's Python backend with its server.

A stub whose server was killed would wait for it for ever, with its model in memory. Every stub
imports `triton_python_backend_utils`; where a Triton is laid out, that module gets a line that
calls this one, so that models need to know nothing of it. The kernel's death signal would not do:
it comes when the *thread* that started the stub ends, not its process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path

_SERVER_NAME = "tritonserver"


def end_with_server() -> None:
    """Kills this process as soon as its parent is no living `tritonserver`."""
    server = os.getppid()
    process = os.pidfd_open(server)
    name = Path(f"/proc/{server}/comm").read_text().strip()
    # It may have ended before there was anything to wait on; the parent is another one then.
    if name != _SERVER_NAME or os.getppid() != server:
        _end()
    threading.Thread(target=_wait, args=(process,), name="stub-guard", daemon=True).start()


def _wait(process: int) -> None:
    select.select([process], [], [])  # a pidfd can be read when its process has ended
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # no more to say, and nobody to say it to
