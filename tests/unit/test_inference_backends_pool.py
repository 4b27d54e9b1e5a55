"""Which backends are candidates: those whose kind this service knows."""

from __future__ import annotations

import pytest
from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.clock import SystemClock
from libs.errors import Unavailable
from libs.routes import EMPTY, RouteTable
from services.inference import metrics
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.backends.targets import Endpoint, Protocol, Target, target_of
from services.inference.domain import BackendFailedError
from tests.support.backends import provider_backend, triton_backend


def triton(identifier: str = "b") -> Backend:
    return triton_backend(identifier, "127.0.0.1:9", model="m-abc")


def newer(identifier: str = "b") -> Backend:
    """Makes a backend whose kind of target is newer than this service: it reads no target."""
    made = triton(identifier)
    made.ClearField("target")
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
    return RouteTable(epoch="e", revision=7, routes=[ModelRoute(model="m", targets=targets)])


@pytest.fixture
async def backends(tmp_path):
    clock = SystemClock()
    backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=StallLimits())
    yield backends
    await backends.close()


def test_a_target_says_how_to_call_a_backend():
    """One function knows the kinds."""
    assert target_of(triton()) == Target(Endpoint(Protocol.TRITON, "127.0.0.1:9", ""), "m-abc")
    provider = provider_backend("p", "https://api.example.com/v1", model="big")
    provider.provider.api_key_name = "k"
    endpoint = Endpoint(Protocol.OPENAI, "https://api.example.com/v1", "k")
    assert target_of(provider) == Target(endpoint, "big")
    assert target_of(newer()) is None


async def test_backends_of_an_unknown_kind_are_skipped(backends, capsys):
    """The others of the deployment answer; it is logged once and shown in a gauge."""
    mixed = routes(a=[newer("new"), triton("old")])
    backends.callable_routes(mixed)
    choice = backends.callable_routes(mixed).choose("m", kind=MODEL_KIND_CHAT)
    assert [each.status.id for each in choice.target.backends] == ["old"]
    assert choice.revision == 7
    assert metrics.UNKNOWN_BACKENDS._value.get() == 1
    with backends.lease(choice.target.backends) as lease:
        assert lease.backend.status.id == "old"
    known = routes(a=[triton()])
    assert backends.callable_routes(known) is known
    assert backends.callable_routes(EMPTY) is EMPTY
    assert metrics.UNKNOWN_BACKENDS._value.get() == 0
    assert capsys.readouterr().out.count("unknown kind") == 1


async def test_a_model_with_only_unknown_backends_is_not_ready(backends):
    """As if its backends were still loading: a fallback of the model may answer."""
    table = backends.callable_routes(routes(a=[newer()]))
    with pytest.raises(Unavailable) as caught:
        table.choose("m", kind=MODEL_KIND_CHAT)
    assert caught.value.reason == "MODEL_NOT_READY"
    assert caught.value.metadata == {"model": "m"}
    assert table.models() == ["m"]
    older = [triton("old")]
    table = backends.callable_routes(routes(a=[newer()], b=older))
    assert table.choose("m", kind=None).target.deployment == "deployments/b"


async def test_unknown_backends_are_never_called(backends):
    """Neither leased nor connected to."""
    unknown = newer()
    with pytest.raises(BackendFailedError, match="known kind"):
        backends.lease([unknown])
    backends.retain([unknown])
    assert not backends._connections
