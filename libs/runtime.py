"""Settings of the interpreter's C libraries, which must be made before anything else is imported.

Every service's `__main__` calls `prepare` first, so that a process runs with the same settings
whatever starts it: the supervisor, a container or a shell.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os

# By default glibc gives each thread a heap of its own, and each heap keeps the memory it has freed.
MAX_HEAPS = 2
# Without its event engine gRPC wakes fewer threads for each message, which is most of what a
# streamed token costs. The switch is undocumented, so it is used only with the version of grpcio
# that it was tried with.
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
TRIED_GRPC_VERSION = "1.85.1"

_M_ARENA_MAX = -8  # from malloc.h


def prepare(*, streams_tokens: bool = False) -> None:
    """Limits the heaps of this process and, on request, makes gRPC's messages cheaper.

    Call it before `grpc` is imported and before any thread is started. Variables that the user has
    set (`MALLOC_ARENA_MAX`, `GRPC_EXPERIMENTS`) stay as they are.

    Args:
        streams_tokens: whether the process passes on streams of small messages.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries than glibc have no such heaps
            libc.mallopt(_M_ARENA_MAX, MAX_HEAPS)
    if streams_tokens and importlib.metadata.version("grpcio") == TRIED_GRPC_VERSION:
        os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
