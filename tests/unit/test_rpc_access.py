"""Every call has a scope that says who may make it."""

from __future__ import annotations

import pytest

from libs.errors import Internal
from libs.rpc.access import (
    BILLING,
    INFER,
    INTERNAL,
    OPEN,
    OPERATOR,
    READ,
    REGISTRY,
    ROUTER,
    required_scope,
    scope_of,
)
from libs.rpc.public_api import public_services
from tests.support.protos import all_methods, path_of

METHODS = list(all_methods())


@pytest.mark.parametrize("method", METHODS, ids=path_of)
def test_each_method_declares_its_scope(method):
    """A new method cannot be forgotten: without a scope this test fails, and no call passes."""
    assert scope_of(method) in {INFER, READ, REGISTRY, ROUTER, BILLING, OPERATOR, INTERNAL}
    assert required_scope(path_of(method)) == scope_of(method)


@pytest.mark.parametrize("method", METHODS, ids=path_of)
def test_internal_methods_are_in_services_of_their_own(method):
    """A service has internal methods only, or none, and its name says so."""
    is_internal = method.containing_service.name.endswith("InternalService")
    assert (scope_of(method) == INTERNAL) is is_internal
    public = {service.full_name for service in public_services()}
    assert (method.containing_service.full_name in public) is not is_internal


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/grpc.health.v1.Health/Check", OPEN),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", OPEN),
        ("/inference.GRPCInferenceService/ServerLive", OPEN),
        ("/inference.GRPCInferenceService/ServerReady", OPEN),
        ("/inference.GRPCInferenceService/ModelInfer", INFER),
        ("/inference.GRPCInferenceService/ServerMetadata", INFER),
    ],
)
def test_other_protocols_have_scopes_too(path, scope):
    """Health and reflection are open; the Open Inference Protocol runs models."""
    assert required_scope(path) == scope


@pytest.mark.parametrize(
    "path", ["/headrace.cost.v1.CostService/NoSuchMethod", "/other.Service/Method"]
)
def test_a_method_without_a_scope_may_not_be_called(path):
    """The default is to refuse."""
    with pytest.raises(Internal, match="declares no scope"):
        required_scope(path)
