"""Resource names of one collection, as in AIP-122; those of model versions are elsewhere."""

from __future__ import annotations

from libs.errors import InvalidArgument
from libs.model_reference import IDENTIFIER

MAX_TENANT_LENGTH = 255
TENANTS_PREFIX = "tenants/"


def resource_name(collection: str, identifier: str) -> str:
    """Returns `collection/identifier`."""
    return f"{collection}/{identifier}"


def parse_name(name: str, collection: str, *, field: str = "name") -> str:
    """Returns the identifier of `collection/identifier`.

    Raises:
        InvalidArgument: the name has another form.
    """
    head, slash, identifier = name.partition("/")
    if head != collection or not slash or not IDENTIFIER.fullmatch(identifier):
        raise InvalidArgument.of_field(
            field,
            f"must be {collection}/ID with an ID of a-z, 0-9 and -, which starts with a letter "
            "and has at most 63 characters",
        )
    return identifier


def tenant_name(tenant: str) -> str:
    """Returns `tenants/{tenant}`, as protos name the tenant of a token."""
    return TENANTS_PREFIX + tenant


def tenant_id(name: str) -> str:
    """Returns the tenant of `tenants/{tenant}`, a name from the mesh itself."""
    return name.removeprefix(TENANTS_PREFIX)


def parse_tenant_name(name: str, *, field: str = "tenant") -> str:
    """Returns the tenant of `tenants/{tenant}`, a name from a client.

    Raises:
        InvalidArgument: the name does not have that form.
    """
    tenant = tenant_id(name)
    if tenant == name or not 0 < len(tenant) <= MAX_TENANT_LENGTH or "\0" in tenant:
        raise InvalidArgument.of_field(
            field, f"must be tenants/TENANT with a tenant of at most {MAX_TENANT_LENGTH} characters"
        )
    return tenant
