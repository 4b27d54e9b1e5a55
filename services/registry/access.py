"""Who may do what only admins and the mesh itself may do."""

from __future__ import annotations

from libs.rpc.identity import ADMIN, SCOPES_KEY, TENANT_KEY, USER_KEY, Context, identity_of

_EDGE_KEYS = {TENANT_KEY, USER_KEY, SCOPES_KEY}


def require_admin_or_mesh(context: Context) -> None:
    """Returns if the caller is an admin, or a service of the mesh that calls for itself.

    The edge names the caller of whatever it lets in; only inside the mesh a call names nobody.

    Raises:
        PermissionDenied: it came through the edge and has not the scope `admin`.
        Unauthenticated: it names its caller in part only.
    """
    if any(key in _EDGE_KEYS for key, _ in context.invocation_metadata() or ()):
        identity_of(context).require(ADMIN)
