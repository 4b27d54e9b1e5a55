"""Who may do what only admins and the mesh itself may do."""

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

_EDGE_KEYS = {TENANT_KEY, USER_KEY, SCOPES_KEY}


def require_admin(context: Context) -> Identity:
    """Returns the caller if it is an admin.

    Raises:
        PermissionDenied: it has not the scope `admin`.
        Unauthenticated: the call names no caller.
    """
    caller = identity_of(context)
    caller.require(ADMIN)
    return caller


def require_admin_or_mesh(context: Context) -> None:
    """Returns if the caller is an admin, or a service of the mesh that calls for itself.

    The edge names the caller of whatever it lets in; only inside the mesh a call names nobody.

    Raises:
        PermissionDenied: it came through the edge and has not the scope `admin`.
        Unauthenticated: it names its caller in part only.
    """
    if any(key in _EDGE_KEYS for key, _ in context.invocation_metadata() or ()):
        require_admin(context)
