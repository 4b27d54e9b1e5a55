"""What an error of Triton, or of a model on it, means: whose fault it is, and who may read what.

This is the only classifier. It returns one of

* a `HeadraceError`: the caller can fix its request. Only two kinds of text reach callers: the
  `message` of an error in the contract of Headrace's models (`deploy/triton/README.md`), and what
  Triton itself finds wrong with tensors that the caller wrote;
* a `BackendFailedError` with `Fault.REQUEST_OR_BACKEND`: the model failed on this request, by an
  exception in its code, for example. `Suspects` finds out whose fault it is;
* a `BackendFailedError` with `Fault.NOBODY`: the backend works, and is busy;
* a `BackendFailedError` with `Fault.BACKEND`: it crashed, stopped, or does not have the model.

The texts of models' exceptions may quote inputs, so they are neither logged nor passed on: an error
says the class of the exception and the lines of code, which go to the log only.
"""

from __future__ import annotations

import json
import re
from typing import Any

import grpc

from libs.errors import HeadraceError, InvalidArgument, ResourceExhausted
from libs.rpc.channel import MAX_MESSAGE_BYTES
from services.inference.domain import (
    MODEL_FAILED,
    QUEUES_FULL,
    BackendFailedError,
    Fault,
)

# The reasons by which a model refuses a request, and the field that is wrong if it names none.
_REFUSALS = {"PROMPT_TOO_LONG": "messages", "INVALID_FIELD": ""}
_QUEUE_FULL = "QUEUE_FULL"
_STOPPING = "CANCELLED"
_INTERNAL = "INTERNAL"

# With these status codes the text decides. Streams have no status, unary calls have those that a
# model may choose. All others come from gRPC, or say that the server cannot work.
_TEXT_DECIDES = frozenset(
    {
        None,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNKNOWN,
    }
)
_BUSY = ("Exceeds maximum queue size", "Request timeout expired")
_BACKEND_CANNOT_WORK = ("Request for unknown model", "Server is ")
_EXECUTION_FAILED = "Failed to process the request(s) "
# How Triton begins what it finds wrong with the tensors of a request, before a model sees them.
_WRONG_TENSORS = (
    "ModelInfer RPC doesn't support",
    "contents field must not be specified",
    "expected ",
    "incomplete string",
    "inference input ",
    "inference request ",
    "input ",
    "invalid value type for ",
    "parameter keys starting with ",
    "unable to find data for input tensor",
    "unexpected ",
)
_TRANSPORT = ("failed to connect", "Socket closed", "Deadline Exceeded", "Connection reset")
_MAX_TEXT_LENGTH = 500
_MAX_FRAMES = 20

_STUB_DIED = re.compile(r"^[^']*'[^']*', message: Stub process '[^']*' is not healthy")
_EXCEPTION = re.compile(r"message: ([A-Za-z_][\w.]*(?:Error|Exception)):")
_FRAME = re.compile(r"^  (\S+\(\d+\): [\w<>.]+)$")


def triton_error(  # noqa: PLR0911  # one return for each kind of error
    text: str,
    *,
    code: grpc.StatusCode | None = None,
    request_id: str = "",
    callers_tensors: bool = False,
) -> HeadraceError | BackendFailedError:
    """Returns the error for a text of Triton's, which may quote the request.

    Args:
        text: the `error_message` of a stream, or the details of a status.
        code: of the status; None: it is from a stream.
        request_id: of the request to Triton, which precedes its texts.
        callers_tensors: whether the caller wrote the tensors, and not this service.
    """
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # the client's limit: Triton has none
        return answer_too_large()
    text = _without_id(text, request_id)
    if text.startswith("{"):
        return _models_error(text)
    if text.startswith(_BUSY):
        return BackendFailedError(text, client_error=QUEUES_FULL, fault=Fault.NOBODY)
    if text.startswith(_BACKEND_CANNOT_WORK) or code not in _TEXT_DECIDES:
        return BackendFailedError(_for_log(text, code))
    if text.startswith(_EXECUTION_FAILED):
        return _execution_failed(text)
    if callers_tensors and _is_about_tensors(text):
        return InvalidArgument(text, reason="INVALID_FIELD")
    return _model_failed(_for_log(text, code))


def answer_too_large() -> ResourceExhausted:
    """Returns the error of an answer that is larger than a message may be."""
    return ResourceExhausted(
        f"the model's answer is larger than {MAX_MESSAGE_BYTES} bytes; request less in one call",
        reason="MESSAGE_TOO_LARGE",
        metadata={"limit_bytes": str(MAX_MESSAGE_BYTES)},
    )


def _models_error(text: str) -> HeadraceError | BackendFailedError:
    """Reads an error in the contract of Headrace's models: JSON with a reason."""
    fields = _object(text)
    reason = fields.get("reason")
    message = str(fields.get("message") or reason)
    if reason == _QUEUE_FULL:
        text = "the model's queue is full"
        return BackendFailedError(text, client_error=QUEUES_FULL, fault=Fault.NOBODY)
    if reason == _STOPPING:
        return BackendFailedError("the model stops")
    if reason == _INTERNAL:
        return _model_failed(message)
    if not isinstance(reason, str) or reason not in _REFUSALS:
        return _model_failed(
            "the model's error is not in the contract, so it may quote the request"
        )
    details = fields.get("metadata")
    metadata = (
        {str(key): str(value) for key, value in details.items()}
        if isinstance(details, dict)
        else {}
    )
    field = metadata.get("field", _REFUSALS[reason])
    return InvalidArgument(
        message, reason=reason, metadata=metadata, field_violations=[(field, message)]
    )


def _execution_failed(text: str) -> BackendFailedError:
    if _STUB_DIED.search(text):
        return BackendFailedError("the process of the model has died")
    return _model_failed(_exception_in(text))


def _model_failed(text: str) -> BackendFailedError:
    return BackendFailedError(
        text, client_error=MODEL_FAILED, attempts=1, fault=Fault.REQUEST_OR_BACKEND
    )


def _without_id(text: str, request_id: str) -> str:
    for known in (request_id, "<id_unknown>"):
        text = text.removeprefix(f"[request id: {known}] ")
    return text


def _is_about_tensors(text: str) -> bool:
    """Returns whether Triton's core wrote a text. Models' texts may have paths and tracebacks."""
    return (
        text.startswith(_WRONG_TENSORS)
        and len(text) <= _MAX_TEXT_LENGTH
        and "/" not in text
        and "\n" not in text
    )


def _for_log(text: str, code: grpc.StatusCode | None) -> str:
    """Returns a text if it cannot quote an input's contents, otherwise its length."""
    status = code.name if code is not None else "error"
    known = (*_BACKEND_CANNOT_WORK, *_TRANSPORT)
    if text.startswith(known) or _is_about_tensors(text):
        return f"{status}: {text[:_MAX_TEXT_LENGTH]}"
    return f"{status}, with a text of {len(text)} characters, which may quote the request"


def _exception_in(text: str) -> str:
    """Returns the class of an exception in a model's code and where it was raised."""
    found = _EXCEPTION.search(text)
    name = found[1] if found else "an exception"
    lines = text.rpartition("\n\nAt:\n")[2].splitlines()
    frames = [frame[1] for line in lines if (frame := _FRAME.match(line))]
    where = ", called at ".join(frames[:_MAX_FRAMES])
    return f"the model raised {name} at {where}" if where else f"the model raised {name}"


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
