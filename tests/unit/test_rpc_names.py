"""Names of resources, and the pages of their lists."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.rpc.names import (
    parse_name,
    parse_tenant_name,
    parse_version_name,
    resource_name,
    tenant_id,
    tenant_name,
    version_name,
)
from libs.rpc.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Page, PageRequest

identifiers = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)


@given(identifiers)
def test_a_name_is_read_as_it_was_made(identifier):
    """Every identifier that the contract allows."""
    assert parse_name(resource_name("models", identifier), "models") == identifier
    model, version = parse_version_name(version_name(identifier, "1.2.3-rc.1+b"))
    assert (model, str(version)) == (identifier, "1.2.3-rc.1+b")


@pytest.mark.parametrize(
    "name",
    [
        "models/smollm2/versions/1.0",
        "models/smollm2/versions/01.0.0",
        "models/smollm2/versions/1.0.0\n",
        "models/smollm2/versions/1.0.0/",
        "models/smollm2/versions/../../x",
        "models/smollm2/versions/1.0.0/versions/1.0.0",
        "models/versions/1.0.0",
        "deployments/smollm2/versions/1.0.0",
        "models/smollm2/versions/1.0.٣",
        "models/smollm2/versions/1.0.0-" + "a" * 60,
        "models/a\n/versions/1.0.0",
    ],
)
def test_what_is_no_name_of_a_version_is_refused(name):
    """It becomes part of paths: nothing else may pass."""
    with pytest.raises(InvalidArgument) as raised:
        parse_version_name(name, field="f")
    assert raised.value.field_violations[0][0] == "f"


@given(st.sets(identifiers, max_size=30).map(sorted), st.integers(1, 10))
def test_pages_give_each_row_once_in_order(rows, size):
    """Whatever the size of a page, to the end."""
    found: list[str] = []
    token = ""
    while True:
        request = PageRequest.parse(size, token)
        page = Page.of(
            [row for row in rows if row > request.after][: request.limit], request, key=str
        )
        assert len(page.rows) <= size
        found += page.rows
        token = page.next_page_token
        if not token:
            break
    assert found == rows


def test_sizes_of_pages_have_a_default_and_a_limit():
    """As the contract says."""
    assert PageRequest.parse(0, "").size == DEFAULT_PAGE_SIZE
    assert PageRequest.parse(10**9, "").size == MAX_PAGE_SIZE
    with pytest.raises(InvalidArgument) as raised:
        PageRequest.parse(-1, "")
    assert raised.value.field_violations[0][0] == "page_size"


@given(st.text())
def test_a_token_is_read_or_refused(token):
    """Clients send what they like; it is never an internal error."""
    with suppress(InvalidArgument):
        assert "\0" not in PageRequest.parse(1, token).after


@pytest.mark.parametrize("tenant", ["acme", "A.b_c@d+e-f", "tenants", "x" * 128])
def test_a_tenant_has_one_name_in_protos(tenant):
    """`tenants/{tenant}`, for every tenant that a token can have."""
    assert parse_tenant_name(tenant_name(tenant)) == tenant_id(tenant_name(tenant)) == tenant


@pytest.mark.parametrize("name", ["", "acme", "tenants/", "tenant/acme", "tenants/\0", "tenants"])
def test_a_wrong_tenant_name_is_refused_by_field(name):
    """Above all the tenant without its prefix."""
    with pytest.raises(InvalidArgument) as caught:
        parse_tenant_name(name, field="price.tenant")
    assert [field for field, _ in caught.value.field_violations] == ["price.tenant"]
