"""Messages of the Open Inference Protocol, read and renamed without decoding their tensors.

Two rules of protobuf's wire format make this possible: if a scalar field occurs twice, the last one
counts, and if a message field occurs twice, both are merged. So a few bytes appended to a message
rename its model, whatever tensors precede them. Reading the names takes a walk over the outermost
fields, which skips their contents: 1.3 us for a tensor of 1 MB, where upb needs 44 us to parse it
and 2,000 us to serialize it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from headrace.common.v1 import model_pb2

from libs.errors import InvalidArgument
from services.inference.backends.triton.codec import CACHE_SALT, LENGTH, malformed

# The parser is Python: a message of millions of empty fields must not block the process. Neither
# may thousands of messages in it with thousands of fields each.
MAX_FIELDS = 4096
MAX_OUTPUTS = 512

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10

# ModelInferRequest
_NAME, _VERSION, _ID, _PARAMETERS, _INPUTS, _REQUESTED_OUTPUTS = 1, 2, 3, 4, 5, 6
_PARAMETER_KEY, _PARAMETER_VALUE, _STRING_PARAMETER = 1, 2, 3
_PARAMETER_NAME = 1
_REQUESTED_NAME, _REQUESTED_PARAMETERS = 1, 2
# Where tensors of a request have their parameters.
_TENSOR_PARAMETERS = {_INPUTS: 4, _REQUESTED_OUTPUTS: _REQUESTED_PARAMETERS}
# ModelInferResponse; name and version are as in the request
_OUTPUTS, _RAW_OUTPUTS = 5, 6
_OUTPUT_NAME = 1
# ModelStreamInferResponse
_ERROR_MESSAGE, _INFER_RESPONSE = 1, 2

# Of a requested output: its name and parameters; of a parameter: its name and its value.
_MAX_FIELDS_OF_PART = 32
_MAX_FIELDS_OF_INPUT = 64
# Parameters that make Triton read or write memory of its machine instead of the message.
_SHARED_MEMORY = b"shared_memory_"
# So many inputs may contain that text, as texts of a tensor may.
_MAX_SUSPECTS = 64

_MALFORMED = (ValueError, IndexError, struct.error)

# The outputs of each kind of model that report its tokens.
USAGE_OUTPUTS = {
    model_pb2.MODEL_KIND_CHAT: ("token_ids", "final"),
    model_pb2.MODEL_KIND_EMBEDDING: ("token_count",),
}


class InferRequestHead(NamedTuple):
    """The fields of a `ModelInferRequest`, apart from its tensors.

    Attributes:
        parameters: the names of the parameters of the whole request.
        outputs: the names of the requested outputs; none: all.
        altered_outputs: those of them that are not requested as they are, but as classes, say.
        tensors_at: the position in the message at which the tensors start.
    """

    model_name: str
    model_version: str
    request_id: str
    parameters: frozenset[str]
    outputs: tuple[str, ...]
    altered_outputs: frozenset[str]
    tensors_at: int


class InferResponseTokens(NamedTuple):
    """The tokens of a `ModelInferResponse`.

    Attributes:
        final: the JSON of a chat model at the end of its answer; else empty.
        generated_tokens: of a chat model, in this message.
        input_tokens: of the texts that an embedding model processed.
        has_outputs: False in the empty message that may follow the last one.
    """

    final: bytes = b""
    generated_tokens: int = 0
    input_tokens: int = 0
    has_outputs: bool = False


class StreamedResponse(NamedTuple):
    """A `ModelStreamInferResponse`, which has one of the two."""

    error_message: str
    tokens: InferResponseTokens


def read_request(message: bytes) -> InferRequestHead:
    """Reads a `ModelInferRequest`.

    The walk covers the whole message, so that appended bytes cannot become part of a field that is
    incomplete.

    Raises:
        InvalidArgument: it is malformed.
    """
    found = {_NAME: "", _VERSION: "", _ID: ""}
    outputs: list[str] = []
    altered: set[str] = set()
    parameters: set[str] = set()
    suspects = 0
    tensors_at = len(message)
    try:
        for number, start, end in fields(message, 0, len(message)):
            if number in _TENSOR_PARAMETERS and message.find(_SHARED_MEMORY, start, end) >= 0:
                suspects += 1
                _check_parameters(message, start, end, _TENSOR_PARAMETERS[number], suspects)
            if number in found:
                found[number] = message[start:end].decode()
            elif number == _INPUTS:
                tensors_at = min(tensors_at, start)
            elif number == _PARAMETERS:
                parameters.add(_parameter_name(message, start, end))
            elif number == _REQUESTED_OUTPUTS:
                _check_count(outputs)
                name, has_parameters = _requested_output(message, start, end)
                outputs.append(name)
                altered.update([name] if has_parameters else [])
    except (ValueError, IndexError) as error:
        raise InvalidArgument(
            f"the message is not a valid ModelInferRequest: {error}", reason="INVALID_FIELD"
        ) from error
    name, version, request_id = found.values()
    return InferRequestHead(
        name,
        version,
        request_id,
        frozenset(parameters),
        tuple(outputs),
        frozenset(altered),
        tensors_at,
    )


def renamed_request(
    message: bytes, model_name: str, *, more_outputs: Collection[str] = (), cache_salt: str = ""
) -> bytes:
    """Returns a `ModelInferRequest` for another model, without a version, with outputs added.

    A cache salt replaces one that the caller has set: of equal keys of a map the last one counts.
    """
    requested = b"".join(
        _field(_REQUESTED_OUTPUTS, _field(_REQUESTED_NAME, name.encode())) for name in more_outputs
    )
    salt = _string_parameter(CACHE_SALT, cache_salt) if cache_salt else b""
    return b"".join((message, requested, salt, _names(model_name, "")))


def read_response(message: bytes) -> InferResponseTokens:
    """Reads a `ModelInferResponse` of a backend.

    Raises:
        BackendFailedError: it is malformed.
    """
    try:
        return _tokens(message, 0, len(message))
    except _MALFORMED as error:
        raise malformed(error) from error


def renamed_response(message: bytes, model_name: str, model_version: str) -> bytes:
    """Returns a `ModelInferResponse` under another name and version."""
    return message + _names(model_name, model_version)


def read_streamed(message: bytes) -> StreamedResponse:
    """Reads a `ModelStreamInferResponse` of a backend.

    Raises:
        BackendFailedError: it is malformed.
    """
    error_message, tokens = "", InferResponseTokens()
    try:
        for number, start, end in fields(message, 0, len(message)):
            if number == _ERROR_MESSAGE:  # it may quote what the caller sent, in any bytes
                error_message = message[start:end].decode(errors="replace")
            elif number == _INFER_RESPONSE:
                tokens = _tokens(message, start, end)
    except _MALFORMED as error:
        raise malformed(error) from error
    return StreamedResponse(error_message, tokens)


def renamed_streamed(message: bytes, model_name: str, model_version: str) -> bytes:
    """Returns a `ModelStreamInferResponse` under another name and version."""
    return message + _field(_INFER_RESPONSE, _names(model_name, model_version))


def streamed_error(error_message: str, request_id: str) -> bytes:
    """Returns the `ModelStreamInferResponse` of a request that failed."""
    answer = _field(_INFER_RESPONSE, _field(_ID, request_id.encode()))
    return _field(_ERROR_MESSAGE, error_message.encode()) + answer


def _tokens(message: bytes, start: int, end: int) -> InferResponseTokens:
    names: list[str] = []
    raw: list[tuple[int, int]] = []
    for number, first, last in fields(message, start, end):
        if number == _OUTPUTS:
            names.append(_last_string(message, first, last, number=_OUTPUT_NAME))
        elif number == _RAW_OUTPUTS:
            raw.append((first, last))
    if not names:
        return InferResponseTokens()
    outputs = dict(zip(names, raw, strict=False))
    nothing = (0, 0)
    final_start, final_end = outputs.get("final", nothing)
    ids_start, ids_end = outputs.get("token_ids", nothing)
    counts_start, counts_end = outputs.get("token_count", nothing)
    counts = struct.unpack(
        f"<{(counts_end - counts_start) // 4}i", message[counts_start:counts_end]
    )
    if min(counts, default=0) < 0:
        raise ValueError("a negative number of tokens")
    return InferResponseTokens(
        final=message[final_start + LENGTH.size : final_end],
        generated_tokens=(ids_end - ids_start) // 4,
        input_tokens=sum(counts),
        has_outputs=True,
    )


def _requested_output(message: bytes, start: int, end: int) -> tuple[str, bool]:
    name, has_parameters = "", False
    for number, first, last in fields(message, start, end, limit=_MAX_FIELDS_OF_PART):
        if number == _REQUESTED_NAME:
            name = message[first:last].decode()
        has_parameters = has_parameters or number == _REQUESTED_PARAMETERS
    return name, has_parameters


def _parameter_name(message: bytes, start: int, end: int) -> str:
    name = ""
    for number, first, last in fields(message, start, end, limit=_MAX_FIELDS_OF_PART):
        if number == _PARAMETER_NAME:
            name = message[first:last].decode()
    return name


def _check_parameters(message: bytes, start: int, end: int, parameters: int, suspects: int) -> None:
    """Refuses parameters for shared memory.

    Raises:
        ValueError: a tensor has one.
    """
    if suspects > _MAX_SUSPECTS:
        raise ValueError(f"more than {_MAX_SUSPECTS} tensors mention shared memory")
    for number, first, last in fields(message, start, end, limit=_MAX_FIELDS_OF_INPUT):
        if number == parameters:
            name = _last_string(message, first, last, number=_PARAMETER_NAME)
            if name.startswith(_SHARED_MEMORY.decode()):
                raise ValueError(f"the parameter {name} is not allowed; send the tensor itself")


def _check_count(outputs: Collection[str]) -> None:
    if len(outputs) >= MAX_OUTPUTS:
        raise ValueError(f"it requests more than {MAX_OUTPUTS} outputs")


def _last_string(message: bytes, start: int, end: int, *, number: int) -> str:
    value = ""
    for found, first, last in fields(message, start, end):
        if found == number:
            value = message[first:last].decode()
    return value


def fields(
    message: bytes, start: int, end: int, *, limit: int = MAX_FIELDS
) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and end of each length-delimited field; skips the others.

    Raises:
        ValueError: the bytes are not a message, or it has too many fields.
        IndexError: they end early.
    """
    position, count = start, 0
    while position < end:
        count += 1
        if count > limit:
            raise ValueError(f"it has more than {limit} fields")
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _BYTES:
            size, position = _varint(message, position)
            if position + size > end:
                raise ValueError("a field is longer than the message")
            yield number, position, position + size
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(message, position)
        elif wire_type in _FIXED_SIZES:
            position += _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"unknown wire type {wire_type}")
    if position != end:
        raise ValueError("the last field is incomplete")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  # the last one has no continuation bit
            return value, position
    raise ValueError("a varint is too long")


def _string_parameter(key: str, value: str) -> bytes:
    value_field = _field(_PARAMETER_VALUE, _field(_STRING_PARAMETER, value.encode()))
    return _field(_PARAMETERS, _field(_PARAMETER_KEY, key.encode()) + value_field)


def _names(model_name: str, model_version: str) -> bytes:
    return _field(_NAME, model_name.encode()) + _field(_VERSION, model_version.encode())


def _field(number: int, value: bytes) -> bytes:
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(value)) + value


def encode_varint(value: int) -> bytes:
    """Returns a number in protobuf's variable-length encoding."""
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004  # seven bits a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
