"""Who calls: what the edge read from the token and put into the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from headrace.events.v1 import events_pb2

from libs.errors import PermissionDenied, Unauthenticated
from libs.rpc.access import INTERNAL

# The tenant under which services call each other.
MESH_TENANT = "headrace"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

TENANT_KEY = "x-headrace-tenant"
USER_KEY = "x-headrace-user"
SCOPES_KEY = "x-headrace-scopes"
# Only from inside the mesh: the edge removes it.
USAGE_ID_KEY = "x-headrace-usage-id"


@dataclass(frozen=True)
class Identity:
    """A caller. Services trust it: only the edge and the mesh itself reach them.

    Attributes:
        usage_id: where the same work may be done more than once, the id under which its usage is
            booked, once; of an attempt that does not end, nothing is booked.
    """

    tenant: str
    user: str
    scopes: frozenset[str] = frozenset()
    usage_id: str = ""

    def require(self, scope: str) -> None:
        """Returns if the caller has the scope.

        Raises:
            PermissionDenied: it has not.
        """
        if scope not in self.scopes:
            raise PermissionDenied(
                f"needs the scope {scope}", reason="SCOPE_MISSING", metadata={"scope": scope}
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata that carries the caller on to the next service."""
        usage = ((USAGE_ID_KEY, self.usage_id),) if self.usage_id else ()
        return (
            (TENANT_KEY, self.tenant),
            (USER_KEY, self.user),
            (SCOPES_KEY, " ".join(sorted(self.scopes))),
            *usage,
        )

    def to_proto(self) -> events_pb2.Identity:
        """Returns the caller as events carry it, without scopes."""
        return events_pb2.Identity(tenant=self.tenant, user=self.user)


def mesh_identity(service: str) -> Identity:
    """Returns the identity of a service that calls another one for itself, not for a user."""
    return Identity(MESH_TENANT, service, frozenset({INTERNAL}))


def identity_of(context: Context) -> Identity:
    """Returns the caller of an RPC.

    Raises:
        Unauthenticated: the metadata names none; the call did not come through the edge.
    """
    return identity_in(dict(context.invocation_metadata() or ()))


def identity_in(headers: Mapping[str, Any]) -> Identity:
    """Returns the caller that the headers of a request name.

    Raises:
        Unauthenticated: they name none; the request did not come through the edge.
    """
    tenant, user = headers.get(TENANT_KEY), headers.get(USER_KEY)
    if not isinstance(tenant, str) or not isinstance(user, str) or not tenant or not user:
        raise Unauthenticated("the call names no tenant and user", reason="TOKEN_INVALID")
    scopes = headers.get(SCOPES_KEY, "")
    usage_id = str(headers.get(USAGE_ID_KEY, ""))
    return Identity(tenant, user, frozenset(str(scopes).split()), usage_id)
