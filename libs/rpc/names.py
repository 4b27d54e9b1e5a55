"""Resource names, as in AIP-122."""

from __future__ import annotations

import re

import semver

from libs.errors import InvalidArgument

_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_VERSION_LENGTH = 64  # it becomes part of file names
MAX_TENANT_LENGTH = 255
TENANTS_PREFIX = "tenants/"


def resource_name(collection: str, identifier: str) -> str:
    """Returns `collection/identifier`."""
    return f"{collection}/{identifier}"


def parse_name(name: str, collection: str, *, field: str = "name") -> str:
    """Returns the identifier of `collection/identifier`.

    Raises:
        InvalidArgument: the name is not of that form.
    """
    head, slash, identifier = name.partition("/")
    if head != collection or not slash or not _ID.fullmatch(identifier):
        raise InvalidArgument.of_field(
            field, f"must be {collection}/ID with an ID of a-z, 0-9 and -, from a letter, up to 63"
        )
    return identifier


def version_name(model: str, version: str) -> str:
    """Returns `models/{model}/versions/{version}`."""
    return f"models/{model}/versions/{version}"


def parse_version_name(name: str, *, field: str = "name") -> tuple[str, semver.Version]:
    """Returns the model's identifier and the version of `models/{model}/versions/{semver}`.

    Raises:
        InvalidArgument: the name is not of that form.
    """
    parent, separator, version = name.partition("/versions/")
    if not separator or len(version) > MAX_VERSION_LENGTH or not semver.Version.is_valid(version):
        raise InvalidArgument.of_field(
            field,
            "must be models/MODEL/versions/VERSION with a semantic version such as 1.0.0, of at "
            f"most {MAX_VERSION_LENGTH} characters",
        )
    return parse_name(parent, "models", field=field), semver.Version.parse(version)


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
