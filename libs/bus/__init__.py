"""Jobs and events over NATS JetStream: durable before acknowledged, delivered at least once."""

from __future__ import annotations

import importlib
import sys

# nats-py imports aiohttp where it is installed, for WebSocket URLs that the mesh does not use. Not
# found for this one import, it costs a process neither 11 MB nor a quarter of a second.
if "aiohttp" not in sys.modules:
    sys.modules["aiohttp"] = None  # type: ignore[assignment]  # the import system's "not there"
    try:
        importlib.import_module("nats")
    finally:
        del sys.modules["aiohttp"]
