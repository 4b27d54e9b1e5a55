"""The scope that each call requires.

RPCs of Headrace have the option `required_scope` in the protos. This module adds what the protos
cannot express: which calls are open, and the scopes of other protocols. The interceptor, the
HTTP servers and the edge's renderer all use this module.
"""

from __future__ import annotations

from functools import cache

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from headrace.common.v1 import access_pb2

from libs.errors import Internal

INFER = "infer"
READ = "read"
# The scopes of those who run a mesh. A token needs only those of what it is for.
REGISTRY = "registry"
ROUTER = "router"
BILLING = "billing"
OPERATOR = "operator"
# For calls between services; no token has it.
INTERNAL = "internal"
# No token is needed.
OPEN = ""

# Health and reflection.
_OPEN_PREFIXES = ("/grpc.health.", "/grpc.reflection.")
# The Open Inference Protocol; `tritonclient` has its protos, without scopes.
_OPEN_INFERENCE = "/inference.GRPCInferenceService/"
_OPEN_INFERENCE_HEALTH = frozenset({"ServerLive", "ServerReady"})

_SCOPE_OF_VALUE = {
    access_pb2.SCOPE_INFER: INFER,
    access_pb2.SCOPE_READ: READ,
    access_pb2.SCOPE_REGISTRY: REGISTRY,
    access_pb2.SCOPE_ROUTER: ROUTER,
    access_pb2.SCOPE_BILLING: BILLING,
    access_pb2.SCOPE_OPERATOR: OPERATOR,
    access_pb2.SCOPE_INTERNAL: INTERNAL,
}


def scope_of(method: MethodDescriptor) -> str:
    """Returns the scope that a method of Headrace requires.

    Raises:
        Internal: the method declares no scope, or an unknown one.
    """
    value = method.GetOptions().Extensions[access_pb2.required_scope]
    if value not in _SCOPE_OF_VALUE:
        raise _undeclared(method.full_name)
    return _SCOPE_OF_VALUE[value]


@cache
def required_scope(path: str) -> str:
    """Returns the scope that a call of `/package.Service/Method` requires; `OPEN`: none.

    Args:
        path: path of a served method; others would grow the cache without limit.

    Raises:
        Internal: the method declares no scope.
    """
    if path.startswith(_OPEN_PREFIXES):
        return OPEN
    if path.startswith(_OPEN_INFERENCE):
        health = path.removeprefix(_OPEN_INFERENCE) in _OPEN_INFERENCE_HEALTH
        return OPEN if health else INFER
    name = path.removeprefix("/").replace("/", ".")
    try:
        method = descriptor_pool.Default().FindMethodByName(name)
    except KeyError as error:
        raise _undeclared(name) from error
    return scope_of(method)


def _undeclared(method: str) -> Internal:
    return Internal(f"{method} declares no scope, so it cannot be called", reason="INTERNAL")
