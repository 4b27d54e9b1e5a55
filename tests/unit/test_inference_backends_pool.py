"""Which backends are candidates: those whose kind this service knows."""

from __future__ import annotations

import pytest
from headrace.common.v1.model_pb2 import (
    BACKEND_KIND_OPENAI,
    BACKEND_KIND_TRITON,
    BACKEND_KIND_UNSPECIFIED,
    MODEL_KIND_CHAT,
    Backend,
    ModelSchema,
)
from headrace.router.v1.router_pb2 import ModelRoute, RouteTarget

from libs.clock import SystemClock
from libs.errors import Unavailable
from libs.routes import EMPTY, RouteTable
from services.inference import metrics
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.backends.targets import Endpoint, Protocol, Target, target_of
from services.inference.domain import BackendFailedError

NEWER_KIND = 99


def backend(kind: int, identifier: str = "b") -> Backend:
    made = Backend(id=identifier, address="127.0.0.1:9", backend_model="m-abc", api_key_name="k")
    made.kind = kind  # type: ignore[assignment]  # an open enum: newer values are kept
    return made


def routes(**versions: list[Backend]) -> RouteTable:
    targets = [
        RouteTarget(
            deployment=f"deployments/{name}",
            model_version=f"models/m/versions/{number}.0.0",
            schema=ModelSchema(kind=MODEL_KIND_CHAT),
            backends=backends,
        )
        for number, (name, backends) in enumerate(versions.items())
    ]
    return RouteTable(revision=7, routes=[ModelRoute(model="m", targets=targets)])


@pytest.fixture
async def backends(tmp_path):
    clock = SystemClock()
    backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=StallLimits())
    yield backends
    await backends.close()


def test_a_target_says_how_to_call_a_backend():
    """One function knows the kinds."""
    assert target_of(backend(BACKEND_KIND_UNSPECIFIED)) == target_of(backend(BACKEND_KIND_TRITON))
    assert target_of(backend(BACKEND_KIND_OPENAI)) == Target(
        Endpoint(Protocol.OPENAI, "127.0.0.1:9", "k"), "m-abc"
    )
    assert target_of(backend(NEWER_KIND)) is None


async def test_backends_of_an_unknown_kind_are_skipped(backends, capsys):
    """The others of the deployment answer; it is logged once and shown in a gauge."""
    mixed = routes(a=[backend(NEWER_KIND, "new"), backend(BACKEND_KIND_TRITON, "old")])
    backends.callable_routes(mixed)
    choice = backends.callable_routes(mixed).choose("m", kind=MODEL_KIND_CHAT)
    assert [each.id for each in choice.target.backends] == ["old"]
    assert choice.revision == 7
    assert metrics.UNKNOWN_BACKENDS._value.get() == 1
    with backends.lease(choice.target.backends) as lease:
        assert lease.backend.id == "old"
    known = routes(a=[backend(BACKEND_KIND_TRITON)])
    assert backends.callable_routes(known) is known
    assert backends.callable_routes(EMPTY) is EMPTY
    assert metrics.UNKNOWN_BACKENDS._value.get() == 0
    assert capsys.readouterr().out.count("unknown kind") == 1


async def test_a_model_with_only_unknown_backends_is_not_ready(backends):
    """As if its backends were still loading: a fallback of the model may answer."""
    table = backends.callable_routes(routes(a=[backend(NEWER_KIND)]))
    with pytest.raises(Unavailable) as caught:
        table.choose("m", kind=MODEL_KIND_CHAT)
    assert caught.value.reason == "MODEL_NOT_READY"
    assert caught.value.metadata == {"model": "m"}
    assert table.models() == ["m"]
    older = [backend(BACKEND_KIND_TRITON, "old")]
    table = backends.callable_routes(routes(a=[backend(NEWER_KIND)], b=older))
    assert table.choose("m", kind=None).target.deployment == "deployments/b"


async def test_unknown_backends_are_never_called(backends):
    """Neither leased nor connected to."""
    unknown = backend(NEWER_KIND)
    with pytest.raises(BackendFailedError, match="known kind"):
        backends.lease([unknown])
    backends.retain([unknown])
    assert not backends._connections
