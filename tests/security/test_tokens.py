"""Only one verified token says who calls, and only in the form that the mesh itself signs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import aiohttp
import grpc
import jwt
import pytest
import pytest_asyncio
from multidict import CIMultiDict

from deploy.keys import keys_dir
from tests.support.otlp import Collector, running_collector
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_CANARY = "canary-7d41"
_CREATE_MODEL = "/headrace.registry.v1.RegistryService/CreateModel"
_CREATE_PRICE = "/headrace.cost.v1.CostService/CreatePrice"
_PRICES = "/headrace.cost.v1.CostService/ListPrices"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with running_collector() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory, collector: Collector) -> AsyncIterator[ScriptedMesh]:
    home = tmp_path_factory.mktemp("edge")
    async with scripted_mesh(home, otlp_endpoint=collector.endpoint) as running:
        yield running


def _signed(mesh: ScriptedMesh, **claims: Any) -> str:
    """Signs any claims with the key of the mesh; those that are None are left out."""
    good = mesh.edge.token(scopes="infer", max_priority=4)
    changed = {**jwt.decode(good, options={"verify_signature": False}), **claims}
    return jwt.encode(
        {name: value for name, value in changed.items() if value is not None},
        (keys_dir(mesh.edge.home) / "edge.pem").read_bytes(),
        algorithm="ES256",
        headers={"kid": jwt.get_unverified_header(good)["kid"]},
    )


async def _generate(mesh: ScriptedMesh, headers: Any, query: str = "") -> tuple[int, Any]:
    """Returns the status and the JSON of a call."""
    async with mesh.http.post(GENERATE_PATH + query, json={}, headers=headers) as response:
        text = await response.text()
        return response.status, json.loads(text.splitlines()[0])


async def _is_refused(mesh: ScriptedMesh, headers: Any, query: str = "") -> None:
    calls = mesh.inference.calls
    status, body = await _generate(mesh, headers, query)
    assert (status, body["code"]) == (401, 16)
    assert body["details"][0]["reason"] == "TOKEN_INVALID"
    assert mesh.inference.calls == calls


@pytest.mark.parametrize("name", ["access_token", "token", "id_token", "bearer_token"])
async def test_a_token_in_the_query_is_none(mesh: ScriptedMesh, name: str) -> None:
    """It would be in histories, in proxies' logs and in traces."""
    await _is_refused(mesh, {}, f"?{name}={mesh.edge.token()}")


async def test_a_token_in_the_query_adds_nothing_to_that_in_the_header(mesh: ScriptedMesh) -> None:
    """Neither its tenant nor its scopes, whichever of the two has them."""
    other = mesh.edge.token(tenant="globex", user="bob", scopes="infer read")
    status, _ = await _generate(mesh, mesh.edge.bearer(scopes="infer"), f"?access_token={other}")
    assert status == 200
    seen = mesh.inference.metadata
    assert (seen["x-headrace-tenant"], seen["x-headrace-user"]) == ("acme", "ann")
    assert seen["x-headrace-scopes"] == "infer"


async def test_a_second_authorization_header_is_refused(mesh: ScriptedMesh) -> None:
    """Not ignored: who reads the request before the edge may choose the other one."""
    good, other = (mesh.edge.token(tenant=tenant) for tenant in ("acme", "globex"))
    for first, second in ((good, other), (good, good), (good, "garbage"), ("garbage", good)):
        headers = CIMultiDict(
            [("authorization", f"Bearer {first}"), ("authorization", f"Bearer {second}")]
        )
        await _is_refused(mesh, headers)
    await _is_refused(mesh, {"authorization": f"Bearer {good},Bearer {other}"})


def _shown(value: Any) -> str:
    """Returns a value as the name of a test."""
    return f"{ascii(value)[:24]} ({len(ascii(value))})"


_NAMES: list[Any] = [
    ["acme"], [], {"name": "acme"}, 7, 7.5, True, "", " ", "-", "_", "a b", " acme", "acme ", "a,b",
    "a/b", "a\x00b", "a\nb", "a\r\nx-headrace-scopes: registry", "a\tb", "a\x7fb", "Zo\u00eb",
    "\u0430cme", "a" * 129, "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("claim", ["tenant", "sub"])
@pytest.mark.parametrize("value", _NAMES, ids=_shown)
async def test_a_name_of_another_form_is_refused(
    mesh: ScriptedMesh, claim: str, value: Any
) -> None:
    """Also if the right key signed it: lists and numbers would look like names in a header."""
    await _is_refused(mesh, {"authorization": f"Bearer {_signed(mesh, **{claim: value})}"})


@pytest.mark.parametrize("claim", ["tenant", "sub"])
async def test_a_missing_name_is_refused(mesh: ScriptedMesh, claim: str) -> None:
    """Headers of the caller do not replace it."""
    headers = {
        "authorization": f"Bearer {_signed(mesh, **{claim: None})}",
        "x-headrace-tenant": "acme",
        "x-headrace-user": "ann",
    }
    await _is_refused(mesh, headers)


@pytest.mark.parametrize(
    "value",
    [
        ["infer"], {"infer": True}, 1, True, "infer,read", "infer  read", " infer", "infer ",
        "INFER", "infer\tread", "infer\x00", "infer internal", "internal", "i" * 33,
        " ".join(["infer"] * 17), "infer " * 1000,
    ],
    ids=_shown,
)  # fmt: skip
async def test_scopes_of_another_form_are_refused(mesh: ScriptedMesh, value: Any) -> None:
    """They are words with single spaces between, and never the scope of services."""
    await _is_refused(mesh, {"authorization": f"Bearer {_signed(mesh, scopes=value)}"})


async def test_the_scope_admin_of_old_tokens_gives_no_rights(mesh: ScriptedMesh) -> None:
    """It was split; a token that was signed before must be replaced."""
    headers = {"authorization": f"Bearer {_signed(mesh, scopes='infer read admin')}"}
    for path, scope in ((_CREATE_PRICE, "billing"), (_CREATE_MODEL, "registry")):
        async with mesh.http.post(path, json={}, headers=headers) as response:
            assert response.status == 403
            (info,) = (await response.json())["details"]
        assert (info["reason"], info["metadata"]) == ("SCOPE_MISSING", {"scope": scope})
    assert (await _generate(mesh, headers))[0] == 200


@pytest.mark.parametrize("value", ["9", "", [9], {"max": 9}, True, 10, -1, 2.5, 1e300])
async def test_a_maximum_priority_of_another_form_is_refused(
    mesh: ScriptedMesh, value: Any
) -> None:
    """It is a number from 0 to 9."""
    await _is_refused(mesh, {"authorization": f"Bearer {_signed(mesh, max_priority=value)}"})


async def test_the_maximum_priority_comes_from_the_token(mesh: ScriptedMesh) -> None:
    """A token without it has none, whatever headers say."""
    for value in (0, 9):
        await _generate(mesh, mesh.edge.bearer(max_priority=value))
        assert mesh.inference.metadata["x-headrace-max-priority"] == str(value)
    headers = {
        "authorization": f"Bearer {_signed(mesh, max_priority=None)}",
        "x-headrace-max-priority": "9",
    }
    assert (await _generate(mesh, headers))[0] == 200
    assert "x-headrace-max-priority" not in mesh.inference.metadata


async def test_the_query_is_in_no_span_log_or_metric(
    mesh: ScriptedMesh, collector: Collector
) -> None:
    """Of calls that pass, that are refused, and that no route takes; in any spelling."""
    query = f"?access_token={_CANARY}&x={quote('Bearer ' + _CANARY)}"
    bearer = mesh.edge.bearer()
    before = len(await mesh.edge.requests_logged(0))
    traces = []
    for number, (path, headers) in enumerate(
        [
            (GENERATE_PATH, bearer),
            (GENERATE_PATH, {}),
            (_PRICES, bearer),
            ("/v1/chat/completions", bearer),
            ("/v1/chat/completions", {}),
            ("/nothing/here", bearer),
        ]
    ):
        traces.append(f"{number:032x}".replace("0", "a"))
        traced = {**headers, "traceparent": f"00-{traces[-1]}-b7ad6b7169203331-01"}
        async with mesh.http.post(path + query, json={}, headers=traced) as response:
            await response.read()
    call = mesh.channel.unary_unary(_PRICES + query, bytes, bytes)
    with suppress(grpc.aio.AioRpcError):
        await call(b"", metadata=mesh.edge.metadata())

    await mesh.edge.requests_logged(before + 5)  # without the completion that succeeded
    spans = await collector.wait_for(
        lambda spans: set(traces) <= {s.trace_id for s in spans if s.service == "headrace-edge"}
    )
    urls = {span.attributes.get("http.url") for span in spans if span.trace_id == traces[0]}
    assert f"{mesh.edge.url}{GENERATE_PATH}" in urls  # the rest of the address is there
    async with (
        aiohttp.ClientSession(mesh.edge.admin) as http,
        http.get("/stats/prometheus") as response,
    ):
        metrics = await response.text()
    written = [mesh.edge.log.read_text(), mesh.edge.log.with_name("edge.err").read_text(), metrics]
    assert not [text for text in (*map(str, spans), *written) if _CANARY in text]
