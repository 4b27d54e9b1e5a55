"""Settings of glibc and gRPC that must be made before other imports.

The `__main__` of each service calls `prepare` first, so that a process has the same settings under
the supervisor, in a container and in a shell.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os

# By default glibc gives each thread its own heap, and each heap retains freed memory.
MAX_HEAPS = 2
# Without its event engine gRPC wakes fewer threads for each message, which is most of the cost of
# a streamed token. The switch is undocumented, so it is used only with the tested version of
# grpcio.
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
        if hasattr(libc, "mallopt"):  # other C libraries have no such heaps
            libc.mallopt(_M_ARENA_MAX, MAX_HEAPS)
    if streams_tokens and importlib.metadata.version("grpcio") == TRIED_GRPC_VERSION:
        os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)


def return_free_memory() -> None:
    """Returns what is free in the heaps to the system, where the C library can.

    Many small pieces of a large message leave holes that the heap keeps. It takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
