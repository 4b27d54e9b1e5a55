"""The identity of a caller comes from its token only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.keys import keys_dir
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_SPOOFED = (
    ("x-headrace-tenant", "victim"),
    ("x-headrace-user", "root"),
    ("x-headrace-scopes", "registry"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as running:
        yield running


async def _generate(mesh: ScriptedMesh, metadata: Any = ()) -> str:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    call = stub.Generate(inference_pb2.GenerateRequest(), metadata=metadata)
    return "".join([message.delta.text async for message in call])


async def _refusal(mesh: ScriptedMesh, metadata: Any) -> str:
    """Returns the message of a call whose token is refused."""
    before = mesh.inference.calls
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _generate(mesh, metadata)
    assert mesh.inference.calls == before
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    info = error_details_pb2.ErrorInfo()
    # Also checks that the details have the call's own code and message.
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # an error is a call
    assert status is not None
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("headrace", "TOKEN_INVALID")
    return caught.value.details() or ""


def _signed(mesh: ScriptedMesh, key: Any = None, **claims: Any) -> tuple[tuple[str, str], ...]:
    """Signs any claims, by default with the key of the mesh."""
    good = jwt.decode(mesh.edge.token(), options={"verify_signature": False})
    kid = jwt.get_unverified_header(mesh.edge.token())["kid"]
    changed = {k: v for k, v in {**good, **claims}.items() if v is not None}
    signing_key = key or (keys_dir(mesh.edge.home) / "edge.pem").read_bytes()
    token = jwt.encode(changed, signing_key, algorithm="ES256", headers={"kid": kid})
    return (("authorization", f"Bearer {token}"),)


async def test_a_good_token_names_the_caller(mesh: ScriptedMesh) -> None:
    """Services get tenant, user and scopes, but not the token itself."""
    mesh.inference.metadata.clear()
    assert await _generate(mesh, mesh.edge.metadata(scopes="infer")) == "Hello"
    assert mesh.inference.metadata["x-headrace-tenant"] == "acme"
    assert mesh.inference.metadata["x-headrace-user"] == "ann"
    assert mesh.inference.metadata["x-headrace-scopes"] == "infer"
    assert "authorization" not in mesh.inference.metadata


async def test_the_token_is_checked_again_when_it_was_accepted_before(mesh: ScriptedMesh) -> None:
    """The cached token of one caller does not give its identity to another caller."""
    await _generate(mesh, mesh.edge.metadata())
    await _generate(mesh, mesh.edge.metadata(tenant="globex", user="bob"))
    assert mesh.inference.metadata["x-headrace-tenant"] == "globex"
    await _generate(mesh, mesh.edge.metadata())
    assert mesh.inference.metadata["x-headrace-tenant"] == "acme"


async def test_no_token_is_refused(mesh: ScriptedMesh) -> None:
    """The message says what is missing."""
    assert await _refusal(mesh, ()) == "the call carries no token"


async def test_an_expired_token_is_refused(mesh: ScriptedMesh) -> None:
    """The message says that a new one is needed."""
    metadata = _signed(mesh, iat=1_000_000_000, exp=1_000_000_060)
    assert await _refusal(mesh, metadata) == "the token has expired"


async def test_forged_tokens_are_refused(mesh: ScriptedMesh) -> None:
    """Another key, audience or issuer, no expiry, no signature, and text that is not a token."""
    unsigned = jwt.encode({"iss": "headrace", "aud": "headrace"}, "", algorithm="none")
    head, body, signature = mesh.edge.token().split(".")
    forged = [
        _signed(mesh, key=ec.generate_private_key(ec.SECP256R1())),
        _signed(mesh, aud="other"),
        _signed(mesh, iss="other"),
        _signed(mesh, exp=None),
        (("authorization", f"Bearer {unsigned}"),),
        (("authorization", f"Bearer {head}.{body}.{signature[::-1]}"),),
        (("authorization", "Bearer garbage"),),
    ]
    for metadata in forged:
        assert await _refusal(mesh, metadata) == "the token is not valid"


async def test_spoofed_headers_are_overwritten(mesh: ScriptedMesh) -> None:
    """A caller cannot take another identity by sending its headers."""
    await _generate(mesh, (*mesh.edge.metadata(scopes="infer read"), *_SPOOFED))
    assert mesh.inference.metadata["x-headrace-tenant"] == "acme"
    assert mesh.inference.metadata["x-headrace-user"] == "ann"
    assert mesh.inference.metadata["x-headrace-scopes"] == "infer read"


async def test_spoofed_headers_do_not_stand_in_for_missing_claims(mesh: ScriptedMesh) -> None:
    """A token without a tenant has none, and one without scopes none, whatever headers say."""
    for claims, code in (
        ({"tenant": None}, grpc.StatusCode.UNAUTHENTICATED),
        ({"scopes": None}, grpc.StatusCode.PERMISSION_DENIED),
    ):
        metadata = _signed(mesh, **claims)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _generate(mesh, (*metadata, *_SPOOFED))
        assert caught.value.code() is code


async def test_spoofed_headers_are_overwritten_for_http_too(mesh: ScriptedMesh) -> None:
    """JSON callers cannot spoof either, in whatever case they write the header."""
    headers = mesh.edge.bearer(scopes="infer read") | {
        "X-Headrace-Tenant": "victim",
        "X-HEADRACE-SCOPES": "root",
    }
    async with mesh.http.post(GENERATE_PATH, json={}, headers=headers) as response:
        assert response.status == 200
        await response.read()
    assert mesh.inference.metadata["x-headrace-tenant"] == "acme"
    assert mesh.inference.metadata["x-headrace-scopes"] == "infer read"


async def test_health_needs_no_token(mesh: ScriptedMesh) -> None:
    """Load balancers have no token, neither for gRPC nor for HTTP."""
    health = health_pb2_grpc.HealthStub(mesh.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with mesh.http.get("/healthz") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/../headrace.inference.v1.InferenceService/Generate",
        "/grpc.health.v1.Health/%2e%2e/headrace.inference.v1.InferenceService/Generate",
        "//headrace.inference.v1.InferenceService/Generate",
        "/headrace.inference.v1.InferenceService/Generate?/grpc.health.v1.Health/Check",
        "/healthz/../headrace.inference.v1.InferenceService/Generate",
    ],
)
async def test_no_spelling_of_a_path_gets_around_the_token(mesh: ScriptedMesh, path: str) -> None:
    """Open paths are open in their exact spelling only."""
    before = mesh.inference.calls
    call = mesh.channel.unary_unary(path, bytes, bytes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert mesh.inference.calls == before
