"""The caller's identity: the edge reads it from the token and puts it into headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
from headrace.events.v1 import events_pb2

from libs.claims import are_scopes, is_name, is_priority
from libs.errors import InvalidArgument, PermissionDenied, Unauthenticated
from libs.rpc.access import INTERNAL
from libs.rpc.names import tenant_name

# The tenant under which services call each other.
MESH_TENANT = "headrace"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

TENANT_KEY = "x-headrace-tenant"
USER_KEY = "x-headrace-user"
SCOPES_KEY = "x-headrace-scopes"
MAX_PRIORITY_KEY = "x-headrace-max-priority"
# Set inside the mesh only: the edge removes it.
USAGE_ID_KEY = "x-headrace-usage-id"
_KEYS = frozenset({TENANT_KEY, USER_KEY, SCOPES_KEY, MAX_PRIORITY_KEY, USAGE_ID_KEY})


@dataclass(frozen=True)
class Identity:
    """A caller. Services trust it: only the mesh reaches them, by sockets or with certificates.

    Attributes:
        max_priority: the highest priority that its requests may ask for.
        usage_id: for work that may be repeated, the id under which its usage is booked once; an
            attempt that does not end books nothing.
    """

    tenant: str
    user: str
    scopes: frozenset[str] = frozenset()
    max_priority: int = 0
    usage_id: str = ""

    def require(self, scope: str) -> None:
        """Checks that the caller has the scope.

        Raises:
            PermissionDenied: it does not have it.
        """
        if scope not in self.scopes:
            raise PermissionDenied(
                f"needs the scope {scope}", reason="SCOPE_MISSING", metadata={"scope": scope}
            )

    def allow_priority(self, priority: int) -> None:
        """Checks that the caller may ask for a priority.

        Raises:
            PermissionDenied: its token allows lower ones only.
        """
        if priority > self.max_priority:
            raise PermissionDenied(
                f"the token allows priorities up to {self.max_priority}",
                reason="PRIORITY_NOT_ALLOWED",
                metadata={"max_priority": str(self.max_priority)},
            )

    def internal(self) -> Identity:
        """Returns the same caller for a call between services on its behalf."""
        return replace(self, scopes=frozenset({INTERNAL}))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata that passes the identity on to the next service."""
        usage = ((USAGE_ID_KEY, self.usage_id),) if self.usage_id else ()
        return (
            (TENANT_KEY, self.tenant),
            (USER_KEY, self.user),
            (SCOPES_KEY, " ".join(sorted(self.scopes))),
            (MAX_PRIORITY_KEY, str(self.max_priority)),
            *usage,
        )

    def to_proto(self) -> events_pb2.Identity:
        """Returns the caller as events carry it: `tenants/{tenant}`, and no scopes."""
        return events_pb2.Identity(tenant=tenant_name(self.tenant), user=self.user)


def mesh_identity(service: str) -> Identity:
    """Returns the identity of a service that calls another one for itself, not for a user."""
    return Identity(MESH_TENANT, service, frozenset({INTERNAL}))


def identity_of(context: Context) -> Identity:
    """Returns the caller of an RPC.

    Raises:
        Unauthenticated: see `identity_in`.
        InvalidArgument: the metadata has two values of a key.
    """
    found: dict[str, Any] = {}
    for key, value in context.invocation_metadata() or ():
        if key in _KEYS:
            if key in found:
                raise InvalidArgument(
                    f"the header {key} must not be repeated", reason="INVALID_FIELD"
                )
            found[key] = value
    return identity_in(found)


def identity_in(headers: Mapping[str, Any]) -> Identity:
    """Returns the caller of a request.

    Raises:
        Unauthenticated: the headers have none, as of a request that did not come through the edge,
            or one of another form than `libs.claims` allows.
    """
    tenant, user = headers.get(TENANT_KEY), headers.get(USER_KEY)
    scopes, max_priority = headers.get(SCOPES_KEY, ""), headers.get(MAX_PRIORITY_KEY, "0")
    if not tenant or not user:
        raise Unauthenticated("the call has no tenant and user", reason="TOKEN_INVALID")
    if not (is_name(tenant) and is_name(user) and are_scopes(scopes) and is_priority(max_priority)):
        raise Unauthenticated("a claim of the token is not valid", reason="TOKEN_INVALID")
    return Identity(
        tenant,
        user,
        frozenset(scopes.split()),
        int(max_priority),
        str(headers.get(USAGE_ID_KEY, "")),
    )
