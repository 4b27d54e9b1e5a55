"""Where a backend of a route is and which protocol it speaks."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from headrace.common.v1.backend_pb2 import Backend


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


def target_of(backend: Backend) -> Target | None:
    """Returns how to call a backend; None: its kind of target is newer than this service."""
    match backend.WhichOneof("target"):
        case "triton":
            triton = backend.triton
            return Target(Endpoint(Protocol.TRITON, triton.address, ""), triton.model)
        case "provider":
            provider = backend.provider
            endpoint = Endpoint(Protocol.OPENAI, provider.base_url, provider.api_key_name)
            return Target(endpoint, provider.model)
        case _:
            return None
