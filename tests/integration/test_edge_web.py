"""Browsers and plain HTTP clients: gRPC-Web, CORS and JSON for every RPC."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf import empty_pb2
from google.rpc import error_details_pb2, status_pb2
from headrace.cost.v1 import cost_pb2
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2

from libs.errors import InvalidArgument, NotFound
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, refusing, scripted_mesh, two_deltas

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_CREATE_PRICE = "/headrace.cost.v1.CostService/CreatePrice"
_WATCH_JOB = "/headrace.jobs.v1.JobService/WatchJob"
_EMBED = "/headrace.inference.v1.InferenceInternalService/Embed"
_ROUTE = "/headrace.router.v1.RouterService/Route"
_ORIGIN = "http://localhost:3000"
_PREFLIGHT = {
    "origin": _ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-grpc-web,grpc-timeout",
}
_TRAILERS = 0x80
_PATIENCE_SECONDS = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as mesh:
        yield mesh


@pytest.fixture
def mesh(running: ScriptedMesh) -> ScriptedMesh:
    running.inference.generate = two_deltas
    return running


def _framed(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def _unframed(body: bytes) -> tuple[list[bytes], dict[str, str]]:
    """Returns the messages of a gRPC-Web answer and its trailers."""
    messages, trailers = [], {}
    while body:
        flags, length = struct.unpack(">BI", body[:5])
        frame, body = body[5 : 5 + length], body[5 + length :]
        if flags & _TRAILERS:
            lines = frame.decode().split("\r\n")
            trailers = {k.lower(): v for k, _, v in (line.partition(":") for line in lines) if k}
        else:
            messages.append(frame)
    return messages, trailers


def _web(mesh: ScriptedMesh, suffix: str = "", **more: str) -> dict[str, str]:
    kind = f"application/grpc-web{suffix}"
    return {**mesh.edge.bearer(), "content-type": kind, "accept": kind, "x-grpc-web": "1", **more}


@pytest.mark.parametrize("suffix", ["", "+proto"])
async def test_grpc_web_streams_and_ends_with_trailers(mesh: ScriptedMesh, suffix: str) -> None:
    """A browser gets the same messages, and the status in the last frame of the body."""
    body = _framed(inference_pb2.GenerateRequest(model="m"))
    async with mesh.http.post(GENERATE_PATH, data=body, headers=_web(mesh, suffix)) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("application/grpc-web")
        messages, trailers = _unframed(await response.read())
    events = [inference_pb2.GenerateResponse.FromString(message) for message in messages]
    assert "".join(event.delta.text for event in events) == "Hello"
    assert events[-1].final.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert trailers["grpc-status"] == "0"


async def test_streams_of_grpc_services_come_in_grpc_web_and_in_json(mesh: ScriptedMesh) -> None:
    """The edge calls most services with gRPC, but generation with HTTP/1.1."""
    body = _framed(jobs_pb2.WatchJobRequest())
    async with mesh.http.post(_WATCH_JOB, data=body, headers=_web(mesh)) as response:
        messages, trailers = _unframed(await response.read())
    names = [jobs_pb2.WatchJobResponse.FromString(message).job.name for message in messages]
    assert (names, trailers["grpc-status"]) == (["x"], "0")
    async with mesh.http.post(_WATCH_JOB, json={}, headers=mesh.edge.bearer()) as response:
        assert json.loads(await response.read())["job"]["name"] == "x"


async def test_grpc_web_text_streams_too(mesh: ScriptedMesh) -> None:
    """Browsers that cannot read binary streams use base64."""
    body = base64.b64encode(_framed(inference_pb2.GenerateRequest(model="m")))
    async with mesh.http.post(GENERATE_PATH, data=body, headers=_web(mesh, "-text")) as response:
        assert response.headers["content-type"].startswith("application/grpc-web-text")
        encoded = await response.read()
    # Each frame is padded by itself.
    parts = [part + b"=" * (-len(part) % 4) for part in encoded.split(b"=") if part]
    messages, trailers = _unframed(b"".join(base64.b64decode(part) for part in parts))
    assert len(messages) == 3
    assert trailers["grpc-status"] == "0"


async def test_grpc_web_errors_carry_details(mesh: ScriptedMesh) -> None:
    """The service's errors and the edge's own are the same for browsers."""
    mesh.inference.generate = refusing(NotFound("no model m", reason="MODEL_NOT_FOUND"))
    mesh.cost.refusals_left = 1
    no_token = _web(mesh) | {"authorization": ""}
    for path, headers, code, reason in (
        (GENERATE_PATH, _web(mesh), "5", "MODEL_NOT_FOUND"),
        (
            _CREATE_PRICE,
            _web(mesh) | mesh.edge.bearer(scopes="billing"),
            "14",
            "DEPENDENCY_UNAVAILABLE",
        ),
        (GENERATE_PATH, no_token, "16", "TOKEN_INVALID"),
    ):
        body = _framed(empty_pb2.Empty())
        async with mesh.http.post(path, data=body, headers=headers) as response:
            assert response.status == 200
            _, trailers = _unframed(await response.read())
            found = {**response.headers, **trailers}  # without messages, trailers are headers
        assert found["grpc-status"] == code
        encoded = found["grpc-status-details-bin"]
        status = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.reason == reason


async def test_a_page_of_an_allowed_origin_may_call(mesh: ScriptedMesh) -> None:
    """The preflight needs no token and allows what gRPC-Web and JSON clients send."""
    async with mesh.http.options(GENERATE_PATH, headers=_PREFLIGHT) as response:
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] == _ORIGIN
        assert "POST" in response.headers["access-control-allow-methods"]
        allowed = response.headers["access-control-allow-headers"].split(", ")
        assert set(_PREFLIGHT["access-control-request-headers"].split(",")) <= set(allowed)
    headers = mesh.edge.bearer() | {"origin": _ORIGIN}
    async with mesh.http.post(GENERATE_PATH, json={}, headers=headers) as response:
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] == _ORIGIN
        assert "grpc-status" in response.headers["access-control-expose-headers"]


async def test_a_page_may_call_openais_paths(mesh: ScriptedMesh) -> None:
    """Also on the path that is forwarded as HTTP."""
    for path in ("/v1/chat/completions", "/v1/models"):
        async with mesh.http.options(path, headers=_PREFLIGHT) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == _ORIGIN


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "null"]
)
async def test_a_page_of_another_origin_may_not(mesh: ScriptedMesh, origin: str) -> None:
    """Without the header, browsers withhold the answer from the page."""
    async with mesh.http.options(
        GENERATE_PATH, headers=_PREFLIGHT | {"origin": origin}
    ) as response:
        assert "access-control-allow-origin" not in response.headers


async def test_a_refused_call_can_be_read_by_the_page(mesh: ScriptedMesh) -> None:
    """A 401 without CORS headers would look like a network failure to the page."""
    async with mesh.http.post(GENERATE_PATH, json={}, headers={"origin": _ORIGIN}) as response:
        assert response.status == 401
        assert response.headers["access-control-allow-origin"] == _ORIGIN


async def test_any_rpc_can_be_called_in_json(mesh: ScriptedMesh) -> None:
    """POST the request to the method's path; fields have their proto names."""
    price = {
        "name": "prices/m-1",
        "model": "m",
        "rates": [
            {
                "kind": "USAGE_KIND_PROMPT_TOKENS",
                "nano_usd": "9007199254740993",
                "per_quantity": "0",
            }
        ],
    }
    headers = mesh.edge.bearer(scopes="billing")
    async with mesh.http.post(_CREATE_PRICE, json={"price": price}, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        answer = await response.json()
    assert price.items() <= answer["price"].items()
    # What is 0 is there, so that a reader need not know the defaults.
    assert answer["price"]["tenant"] == ""
    assert cost_pb2.Price.DESCRIPTOR.fields_by_name.keys() - answer["price"].keys() == {
        "effective_time",
        "create_time",
    }


async def test_json_streams_line_by_line(mesh: ScriptedMesh) -> None:
    """Each message is one line, sent before the next one exists; in JSON an int64 is a string."""
    may_go_on = asyncio.Event()

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="a", token_count=1))
        await may_go_on.wait()
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="b"))

    mesh.inference.generate = generate
    async with (
        asyncio.timeout(_PATIENCE_SECONDS),
        mesh.http.post(GENERATE_PATH, json={"model": "m"}, headers=mesh.edge.bearer()) as response,
    ):
        delta = json.loads(await response.content.readline())["delta"]
        assert (delta["text"], delta["token_count"]) == ("a", "1")
        may_go_on.set()
        delta = json.loads(await response.content.readline())["delta"]
        assert (delta["text"], delta["token_count"]) == ("b", "0")


async def test_json_errors_are_the_status_itself(mesh: ScriptedMesh) -> None:
    """Code, message and details in JSON, with the HTTP status of the code."""
    mesh.inference.generate = refusing(InvalidArgument.of_field("messages", "must not be empty"))
    async with mesh.http.post(GENERATE_PATH, json={}, headers=mesh.edge.bearer()) as response:
        assert response.status == 400
        body = await response.json()
    info, bad_request = body["details"]
    assert (body["code"], body["message"]) == (3, "messages: must not be empty")
    assert (info["reason"], info["domain"]) == ("INVALID_FIELD", "headrace")
    assert bad_request["field_violations"][0]["field"] == "messages"
    mesh.cost.refusals_left = 1
    headers = mesh.edge.bearer(scopes="billing")
    async with mesh.http.post(_CREATE_PRICE, json={}, headers=headers) as response:
        assert response.status == 503
        body = await response.json()
    assert body["details"][0]["reason"] == "DEPENDENCY_UNAVAILABLE"
    assert body["details"][1]["retry_delay"] == "0.100s"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"path": GENERATE_PATH, "data": b'{"model":'}, (400, 3, "INVALID_FIELD")),
        ({"path": GENERATE_PATH, "json": {"model": 7}}, (400, 3, "INVALID_FIELD")),
        ({"path": GENERATE_PATH, "json": {}, "headers": {}}, (401, 16, "TOKEN_INVALID")),
        ({"path": _EMBED, "json": {}}, (404, 12, "METHOD_NOT_FOUND")),
        ({"path": "/nothing", "json": {}}, (404, 12, "METHOD_NOT_FOUND")),
        ({"path": _ROUTE, "json": {}}, (503, 14, "EDGE_UNAVAILABLE")),
    ],
)  # fmt: skip
async def test_what_the_edge_answers_itself_is_a_status_in_json(
    mesh: ScriptedMesh, sent: dict[str, Any], expected: tuple[int, int, str]
) -> None:
    """Bad JSON, no token, internal or unknown paths, a service that is down."""
    request = {"headers": mesh.edge.bearer(), **sent}
    async with mesh.http.post(request.pop("path"), **request) as response:
        assert response.content_type == "application/json"
        body = await response.json()
        info = body["details"][0]
        assert (response.status, body["code"], info["reason"]) == expected
        assert "grpc-status-details-bin" not in response.headers
    assert body["message"]
    assert info["domain"] == "headrace"
