"""Makes backends as in routes."""

from __future__ import annotations

from headrace.common.v1 import backend_pb2, model_pb2


def triton_backend(identifier: str, address: str, *, model: str = "m") -> backend_pb2.Backend:
    """Makes a ready backend on a Triton server at `host:port`."""
    return backend_pb2.Backend(
        status=_ready(identifier), triton=backend_pb2.TritonTarget(address=address, model=model)
    )


def provider_backend(identifier: str, base_url: str, *, model: str = "m") -> backend_pb2.Backend:
    """Makes a ready backend at a provider without an API key."""
    return backend_pb2.Backend(
        status=_ready(identifier),
        provider=backend_pb2.ProviderTarget(base_url=base_url, model=model),
    )


def _ready(identifier: str) -> model_pb2.BackendStatus:
    return model_pb2.BackendStatus(id=identifier, state=model_pb2.BACKEND_STATE_READY)
