"""The example in Python, against a scripted service that breaks off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

EXAMPLE = Path(__file__).parents[2] / "examples" / "python" / "stream.py"
MAX_LINES = 80  # a page


class _Model(inference_pb2_grpc.InferenceServiceServicer):
    """Breaks off after `one`, and goes on where it is asked to."""

    def Generate(self, request, context):
        assert ("authorization", "Bearer t") in context.invocation_metadata()
        if request.model == "nope":
            status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="no such model")
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND"))
            context.abort_with_status(rpc_status.to_status(status))
        if not request.resume_from:
            delta = inference_pb2.Delta(text="one ", resume_token="1")  # noqa: S106  # not a password
            yield inference_pb2.GenerateResponse(delta=delta)
            context.abort(grpc.StatusCode.UNAVAILABLE, "a backend died")
        assert request.resume_from == "1"
        delta = inference_pb2.Delta(text="two", resume_token="2")  # noqa: S106  # not a password
        yield inference_pb2.GenerateResponse(delta=delta)
        final = inference_pb2.Final(cost_nano_usd=7)
        final.usage.completion_tokens = 2
        yield inference_pb2.GenerateResponse(final=final)


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    model = _Model()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def _run(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE, "Name three rivers."],
        env={"PATH": os.environ["PATH"], "HEADRACE_ADDRESS": address, "TOKEN": "t"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_example_goes_on_after_a_break(address: str):
    """No word twice, and none lost."""
    done = _run(address)

    assert (done.returncode, done.stdout) == (0, "one two\n2 tokens, 7 nano-dollars\n")
    assert len(EXAMPLE.read_text().splitlines()) <= MAX_LINES


def test_the_example_names_the_reason_of_an_error(address: str):
    """From `ErrorInfo`, which programs act on."""
    done = _run(address, MODEL="nope")

    assert (done.returncode, done.stderr) == (1, "NOT_FOUND MODEL_NOT_FOUND: no such model\n")
