"""Whose fault an error of Triton's is, and who may read its text."""

from __future__ import annotations

import json

import grpc
import pytest

from libs.errors import InvalidArgument, ResourceExhausted
from services.inference.backends.triton.errors import triton_error
from services.inference.domain import MODEL_FAILED, QUEUES_FULL, BackendFailedError, Fault

CANARY = "canary-4f2e"
# As Triton 2.51 writes it; others write "model instance".
RAISED = (
    f"Failed to process the request(s) for model 'm_0_0', message: ValueError: {CANARY}\n"
    f"  /{CANARY}.py(1): f\n\nAt:\n  /srv/models/m/1/model.py(12): execute\n"
)
DIED = (
    "Failed to process the request(s) for model 'm_0_0', message: "
    "Stub process 'm_0_0' is not healthy."
)
SHAPE = "unexpected shape for input 'text' for model 'm'. Expected [-1,1], got [2]"
Code = grpc.StatusCode


def failure(text: str, **details: object) -> BackendFailedError:
    error = triton_error(text, **details)  # type: ignore[arg-type]  # the test names them
    assert isinstance(error, BackendFailedError), error
    return error


@pytest.mark.parametrize("callers_tensors", [False, True])
@pytest.mark.parametrize("code", [None, Code.INTERNAL, Code.INVALID_ARGUMENT, Code.UNKNOWN])
@pytest.mark.parametrize(
    "text",
    [
        RAISED,
        CANARY,
        f"[request id: <id_unknown>] {RAISED}",
        RAISED.replace("model 'm", "model instance 'm"),
        f"Failed to process the request(s) for model 'm', message: {CANARY} is not healthy",
        f"unexpected {CANARY} in /srv/secret",
        f"input {CANARY}\nAt:",
        "{" + CANARY,
        json.dumps({"reason": None, "message": CANARY}),
        json.dumps({"reason": "BROKEN", "message": CANARY}),
    ],
)
def test_a_models_exception_is_undecided_and_tells_nobody_its_text(text, code, callers_tensors):
    """It may quote inputs of others: neither callers nor the log see it."""
    error = failure(text, code=code, callers_tensors=callers_tensors)
    assert error.fault is Fault.REQUEST_OR_BACKEND
    assert error.client_error is MODEL_FAILED
    assert CANARY not in str(error)
    to_caller = error.client_error.to_error(["b"], request_id="r-1")
    assert to_caller.code == "INTERNAL"
    assert "r-1" in to_caller.message
    assert CANARY not in to_caller.message + str(to_caller.metadata)


def test_the_log_says_what_was_raised_and_where():
    """The class and the lines of code cannot quote an input."""
    assert str(failure(RAISED)) == (
        "the model raised ValueError at /srv/models/m/1/model.py(12): execute"
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (DIED, Code.INTERNAL),
        (DIED, None),
        (DIED.replace("model 'm", "model instance 'm"), None),
        ("Request for unknown model: 'm' is not found", Code.NOT_FOUND),
        ("Request for unknown model: 'm' is not found", None),
        ("Server is stopping, scheduler for model has stopped", Code.UNAVAILABLE),
        ("failed to connect to all addresses", Code.UNAVAILABLE),
        ("", Code.UNAVAILABLE),
        ("", Code.DEADLINE_EXCEEDED),
        (CANARY, Code.CANCELLED),
        ('{"reason": "CANCELLED", "message": "stopping"}', Code.CANCELLED),
    ],
)
def test_a_backend_that_cannot_work_is_at_fault(text, code):
    """Crashed, stopping, unreachable, silent, or without the model."""
    error = failure(text, code=code, callers_tensors=True)
    assert error.fault is Fault.BACKEND
    assert CANARY not in str(error)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Exceeds maximum queue size", Code.UNAVAILABLE),
        ("[request id: r] Exceeds maximum queue size", None),
        ("Request timeout expired", Code.UNAVAILABLE),
        ('{"reason": "QUEUE_FULL", "message": "2 wait"}', Code.UNAVAILABLE),
    ],
)
def test_a_full_queue_is_nobodys_fault(text, code):
    """One tenant could fill it: the breaker must not refuse the model to all."""
    error = failure(text, code=code, request_id="r")
    assert (error.fault, error.client_error) == (Fault.NOBODY, QUEUES_FULL)


def test_what_is_wrong_with_the_callers_tensors_is_told_to_the_caller():
    """Triton's core says it, and quotes names and shapes only."""
    error = triton_error(SHAPE, code=Code.INVALID_ARGUMENT, callers_tensors=True)
    assert isinstance(error, InvalidArgument)
    assert error.message == SHAPE
    ours = failure(SHAPE, code=Code.INVALID_ARGUMENT)  # this service wrote the tensors
    assert ours.fault is Fault.REQUEST_OR_BACKEND
    assert "unexpected shape" in str(ours)


def test_an_answer_that_is_too_large_is_the_requests_fault():
    """The client refuses it; a request can ask for it."""
    text = "CLIENT: Received message larger than max (99 vs. 9)"
    error = triton_error(text, code=Code.RESOURCE_EXHAUSTED, callers_tensors=True)
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "MESSAGE_TOO_LARGE"
