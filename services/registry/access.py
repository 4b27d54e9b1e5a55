"""Checks the callers of admin and internal RPCs."""

from __future__ import annotations

from libs.rpc.identity import (
    ADMIN,
    SCOPES_KEY,
    TENANT_KEY,
    USER_KEY,
    Context,
    Identity,
    identity_of,
)

INTERNAL = "internal"
_IDENTITY_KEYS = {TENANT_KEY, USER_KEY, SCOPES_KEY}


def require_admin(context: Context) -> Identity:
    """Returns the caller if it has the scope `admin`.

    Raises:
        PermissionDenied: it does not have the scope.
        Unauthenticated: the call has no identity.
    """
    caller = identity_of(context)
    caller.require(ADMIN)
    return caller


def require_internal(context: Context) -> None:
    """Checks that a service of the mesh calls: without an identity, or with the scope `internal`.

    The edge adds the identity of the caller to every call that it forwards, and never that scope.

    Raises:
        PermissionDenied: the call comes from a user.
    """
    metadata = dict(context.invocation_metadata() or ())
    if _IDENTITY_KEYS & metadata.keys():
        scopes = frozenset(str(metadata.get(SCOPES_KEY, "")).split())
        Identity("", "", scopes).require(INTERNAL)
