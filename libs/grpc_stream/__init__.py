"""A client of gRPC calls that send one message and receive a stream of messages, as bytes.

Used where the cost of each message counts: `grpc.aio` passes every message through a completion
queue, a thread and a socket that wakes the event loop. Here one `read` returns all messages that
one read of the socket brought. HTTP/2 itself is the library `h2`.

Others use what is exported here; the modules inside are private to this package.
"""

from __future__ import annotations

from libs.grpc_stream.call import ServerStreamCall, ServerStreamError
from libs.grpc_stream.client import Metadata, ServerStreamClient

__all__ = ["Metadata", "ServerStreamCall", "ServerStreamClient", "ServerStreamError"]
