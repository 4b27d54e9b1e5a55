"""Where a backend of a route is and which protocol it speaks."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from headrace.common.v1.model_pb2 import Backend, BackendKind


class Protocol(Enum):
    """The protocols that this service speaks to backends."""

    TRITON = "triton"
    OPENAI = "openai"


class Endpoint(NamedTuple):
    """What one client connects to. Models of the same endpoint share its connections.

    Attributes:
        protocol: how to call it.
        address: `host:port` of a Triton, or a provider's base URL.
        api_key_name: the file of the provider's API key; empty: none is needed.
    """

    protocol: Protocol
    address: str
    api_key_name: str


class Target(NamedTuple):
    """An endpoint and its name of the model."""

    endpoint: Endpoint
    model: str


# The first enum value stands for Triton, as the proto says.
_PROTOCOLS = {
    BackendKind.BACKEND_KIND_UNSPECIFIED: Protocol.TRITON,
    BackendKind.BACKEND_KIND_TRITON: Protocol.TRITON,
    BackendKind.BACKEND_KIND_OPENAI: Protocol.OPENAI,
}


def target_of(backend: Backend) -> Target | None:
    """Returns how to call a backend; None: its kind is newer than this service."""
    protocol = _PROTOCOLS.get(backend.kind)
    if protocol is None:
        return None
    return Target(Endpoint(protocol, backend.address, backend.api_key_name), backend.backend_model)
