"""Requests of the Open Inference Protocol over several backends."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from tritonclient.grpc import service_pb2

from libs.errors import (
    HeadraceError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from libs.rpc.identity import Identity
from services.inference.tensors.oip import Caller
from tests.support.tensor_mesh import (
    BACKEND_MODEL,
    CALLER,
    UUID,
    mesh_of,
    request,
)
from tests.support.tensor_server import TensorServer


async def test_the_client_sees_public_names_and_the_backend_its_own(tmp_path):
    """Name and version are translated on both ways; the tensors are the same bytes."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        answer = await mesh.infer(request("embedder", model_version="1.0.0", id=UUID))
    (received,) = server.requests
    assert (received.model_name, received.model_version) == (BACKEND_MODEL, "")
    assert list(received.raw_input_contents) == [b"\x00\xff"]
    assert (answer.model_name, answer.model_version, answer.id) == ("embedder", "1.0.0", UUID)
    (bill,) = mesh.bills.recorded
    assert (bill["request_id"], bill["operation"], bill["model"]) == (UUID, "infer", "embedder")
    assert bill["usage"].prompt_tokens == 7


async def test_a_tenant_cannot_choose_the_salt_of_its_prefix_cache(tmp_path):
    """It would read what another one has asked; its own salt is the same in each request."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        await mesh.stream(request("chatter", parameters={"cache_salt": {"string_param": "theirs"}}))
        mesh.caller = Caller(Identity("other", "ann"), None)
        await mesh.stream(request("chatter", parameters={"cache_salt": {"int64_param": 3}}))
        mesh.caller = CALLER
        await mesh.stream(request("chatter"))
        await mesh.infer(request("embedder"))
    mine, other, again, vectors = (each.parameters for each in server.requests)
    salt = mine["cache_salt"].string_param
    assert len(salt) == 32
    assert salt == again["cache_salt"].string_param != other["cache_salt"].string_param != ""
    assert "cache_salt" not in vectors


async def test_tokens_are_billed_whichever_outputs_are_requested(tmp_path):
    """The outputs that report them are added if others are named; none is altered."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        await mesh.infer(request("embedder", outputs=[{"name": "embedding"}]))
    assert [output.name for output in server.requests[0].outputs] == ["embedding", "token_count"]
    for name in ("token_count", "embedding"):
        altered = {"name": name, "parameters": {"classification": {"int64_param": 1}}}
        with pytest.raises(InvalidArgument, match=name):
            await mesh.infer(request("embedder", outputs=[{"name": "embedding"}, altered]))


async def test_a_backend_describes_a_version_once(tmp_path):
    """It never changes, and a description waits for no slot: repeated calls cost Triton nothing."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for model in ("embedder", "chatter"):
            for _ in range(50):
                answer = await mesh.service.describe(
                    mesh.service.choose(model, ""),
                    "ModelConfig",
                    lambda name: service_pb2.ModelConfigRequest(name=name),
                    service_pb2.ModelConfigResponse,
                    deadline_seconds=None,
                )
                assert (answer.config.name, answer.config.max_batch_size) == (BACKEND_MODEL, 8)
                answer.config.name = "changed by the caller"
    assert len(server.requests) == 2


async def test_the_priority_of_triton_needs_the_highest_one_of_a_token(tmp_path):
    """In it 1 is the highest, so that it cannot be compared with the token's."""
    server = TensorServer()
    first = {"priority": {"int64_param": 1}}
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        mesh.caller = Caller(replace(CALLER.identity, max_priority=8), None)
        for call in (mesh.infer, mesh.stream):
            with pytest.raises(PermissionDenied) as caught:
                await call(request("embedder", parameters=first))
            assert caught.value.reason == "PRIORITY_NOT_ALLOWED"
        assert server.requests == []
        await mesh.infer(request("embedder", parameters={"timeout": {"int64_param": 1000}}))
        mesh.caller = Caller(replace(CALLER.identity, max_priority=9), None)
        await mesh.infer(request("embedder", parameters=first))
    assert server.requests[-1].parameters["priority"].int64_param == 1


async def test_another_backend_answers_if_one_failed(tmp_path):
    """Nothing was delivered, so the client sees no failure."""
    bad = TensorServer(fails=(grpc.StatusCode.UNAVAILABLE, "killed"), dies_after=0)
    good = TensorServer()
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        await mesh.infer(request("embedder"))
        await mesh.stream(request("chatter"))
    assert len(bad.requests) >= 1
    assert len(good.requests) == 2
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [7, 9]


async def test_a_wrong_request_is_tried_once_and_opens_no_breaker(tmp_path):
    """The text is Triton's, with the public name; text of the request itself has no effect."""
    text = f"[request id: mine] unexpected inference input 'Server is ' for model '{BACKEND_MODEL}'"
    server = TensorServer(fails=(grpc.StatusCode.INVALID_ARGUMENT, text), error_message=text)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(12):
            with pytest.raises(InvalidArgument, match=r"for model 'embedder'$"):
                await mesh.infer(request("embedder"))
            with pytest.raises(InvalidArgument, match="unexpected inference input"):
                await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert len(server.requests) == 24
    assert mesh.bills.recorded == []


RAISED = (
    "Failed to process the request(s) for model instance 'm', message: ValueError: canary\n\n"
    "At:\n  /srv/model.py(1): execute\n"
)


async def test_requests_on_which_the_model_fails_open_no_breaker_for_others(tmp_path, capsys):
    """Whoever sends them, and however many: the others are answered."""
    servers = [TensorServer(), TensorServer()]
    async with mesh_of(*servers, tmp_path=tmp_path) as mesh:
        for _ in range(30):
            for server in servers:
                server.fails, server.error_message = (grpc.StatusCode.INTERNAL, RAISED), RAISED
            for call in (mesh.infer(request("embedder")), mesh.stream(request("chatter", id=UUID))):
                with pytest.raises(Internal) as caught:
                    await call
                assert caught.value.reason == "MODEL_FAILED"
                assert caught.value.metadata["request_id"]
                assert "canary" not in str(caught.value)
        for server in servers:
            server.fails, server.error_message = None, ""
        received = sum(len(server.requests) for server in servers)
        await mesh.infer(request("embedder"))
        await mesh.stream(request("chatter"))
    assert received == 30 * 2 * 2  # each is tried twice
    assert sum(len(server.requests) for server in servers) == received + 2
    logged = capsys.readouterr().out
    assert "/srv/model.py(1): execute" in logged
    assert "canary" not in logged


async def test_a_backend_that_fails_on_what_another_answers_is_at_fault(tmp_path):
    """Its breaker opens after a few requests; all of them were answered."""
    broken, good = TensorServer(fails=(grpc.StatusCode.INTERNAL, RAISED)), TensorServer()
    async with mesh_of(broken, good, tmp_path=tmp_path) as mesh:
        for _ in range(20):
            await mesh.infer(request("embedder"))
    assert len(good.requests) == 20
    assert len(broken.requests) == 5


async def test_a_full_queue_opens_no_breaker(tmp_path):
    """One tenant can fill it."""
    server = TensorServer(fails=(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"))
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(10):
            with pytest.raises(ResourceExhausted) as caught:
                await mesh.infer(request("embedder"))
            assert caught.value.reason == "QUEUE_FULL"
        server.fails = None
        await mesh.infer(request("embedder"))


async def test_bytes_that_are_no_text_reach_no_model(tmp_path):
    """A model may fail on them, together with the batch that they are in."""
    server = TensorServer()
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1]}
    message = service_pb2.ModelInferRequest(
        model_name="embedder", inputs=[tensor], raw_input_contents=[b"\x02\0\0\0a\xff"]
    )
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(InvalidArgument, match="UTF-8"):
            await mesh.infer(message)
    assert server.requests == []


@pytest.mark.parametrize(
    ("model", "version", "kind", "reason"),
    [
        ("nobody", "", NotFound, "MODEL_NOT_FOUND"),
        ("embedder", "1", NotFound, "MODEL_NOT_FOUND"),
        ("chatter", "", InvalidArgument, "MODEL_KIND_MISMATCH"),
        ("provided", "", InvalidArgument, "MODEL_KIND_MISMATCH"),
    ],
)
async def test_models_that_cannot_be_served_are_refused_with_a_reason(
    model: str, version: str, kind: type[HeadraceError], reason: str, tmp_path
):
    """Before any backend is called."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(kind) as caught:
            await mesh.infer(request(model, model_version=version))
    assert caught.value.reason == reason
    assert server.requests == []
