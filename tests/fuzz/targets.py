"""The parsers that read bytes of strangers, each as a function of bytes.

A target raises only if the parser breaks its promise: an error of another class than documented, an
error that cannot be sent, or an answer that cannot be right.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from google.rpc import status_pb2
from headrace.inference.v1 import inference_pb2

from libs import artifact_tar
from libs.chat.request import MAX_MESSAGES, GenerationRequest
from libs.chat.resume import parse_token
from libs.chat.wire import generation_request
from libs.errors import HeadraceError, Internal, InvalidArgument, Unauthenticated, Unimplemented
from libs.grpc_stream.call import ServerStreamCall, ServerStreamError
from libs.http1 import Exchange
from libs.http1.request import MAX_HEAD_BYTES, BadRequestError, Request, RequestReader
from libs.http_client.connection import ClientConnection
from libs.http_client.response import HttpError
from libs.http_client.urls import Url
from libs.model_reference import ModelReference, parse_version_name
from libs.openai.bodies import to_json
from libs.openai.chat_request import parse_chat_completion
from libs.openai.errors import error_object
from libs.rpc import grpc_timeout
from libs.rpc.filter import parse_filter
from libs.rpc.framing import framed
from libs.rpc.grpc_http1 import GrpcCall
from libs.rpc.identity import (
    MAX_PRIORITY_KEY,
    SCOPES_KEY,
    TENANT_KEY,
    USER_KEY,
    identity_in,
)
from libs.rpc.names import parse_name, parse_tenant_name
from libs.rpc.paging import PageRequest
from libs.rpc.served_call import MAX_REQUEST_BYTES, read_message
from libs.rpc.status import from_details, to_status
from services.embedding_cache.openai import parse_embedding_request
from services.inference.backends.openai_http.sse import CompletionStreamParser, read_completion
from services.inference.backends.triton import codec as triton_codec
from services.inference.domain import BackendFailedError
from services.inference.tensors import codec
from services.registry.manifest import parse_manifest
from tests.fuzz.wire import Wire

Target = Callable[[bytes], object]


class Sendable(NamedTuple):
    """An error as callers get it."""

    status: status_pb2.Status
    body: bytes


def sendable(error: HeadraceError) -> Sendable:
    """Writes an error in both forms; raises if that is not possible."""
    status = to_status(error)
    assert len(status.SerializeToString()) < 8192
    return Sendable(status, to_json(error_object(error)))


def _answered(work: Callable[[], object]) -> object:
    """Runs work that may refuse its input with an error that can be sent."""
    try:
        return work()
    except (InvalidArgument, Unimplemented) as error:
        return sendable(error)


def _text(data: bytes) -> str:
    """Returns any text that a request can have: protobuf and headers ensure UTF-8."""
    return data.decode(errors="replace")


class _Events:
    """What a connection does with what its reader reports."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def request_began(self) -> None: ...

    def continue_expected(self) -> None: ...

    def request_received(self, request: Request) -> None:
        self.requests.append(request)

    def body_too_long(self) -> None: ...

    def max_body_bytes(self, _path: str) -> int:
        return 1024

    def is_single_header(self, name: str) -> bool:
        return name.startswith("grpc-")


def http_request(data: bytes) -> object:
    """The HTTP/1.1 server's parser; how the network splits the bytes makes no difference."""
    results = []
    for parts in ([data], [data[at : at + 1] for at in range(len(data))]):
        events = _Events()
        reader = RequestReader(events, events)
        refused = 0
        try:
            for part in parts:
                reader.feed(part)
        except BadRequestError as error:
            refused = error.status.value
            assert refused in (400, 501)
        assert reader.received_bytes <= max(len(data), MAX_HEAD_BYTES)
        results.append((events.requests, refused))
        for request in events.requests:
            assert len(request.body) <= 1024
            assert not (request.too_large and request.body)
    if len(data) < MAX_HEAD_BYTES:
        assert results[0] == results[1]
    return results[0]


def http_response(data: bytes) -> object:
    """The HTTP client's parser."""

    async def receive() -> object:
        connection = ClientConnection(on_free=lambda _: None)
        connection.connection_made(Wire())
        answered = asyncio.ensure_future(connection.send(b"GET / HTTP/1.1\r\n\r\n"))
        await asyncio.sleep(0)
        connection.data_received(data[: len(data) // 2])
        if connection.usable:
            connection.data_received(data[len(data) // 2 :])
        connection.connection_lost(None)
        try:
            response = await answered
            body = b""
            while part := await response.read():
                body += part
        except HttpError as error:
            return str(error)
        return response.status, body

    return _run(receive())


def _run(work: Any) -> object:
    return _LOOP.run_until_complete(work)


_LOOP = asyncio.new_event_loop()


def events(data: bytes) -> object:
    """Server-sent events of a provider."""
    parser = CompletionStreamParser()
    try:
        text = "".join(parser.feed(data[at : at + 7]).text for at in range(0, len(data), 7))
        text.encode()  # no halves of surrogate pairs
        return text, parser.finish()
    except BackendFailedError as error:
        return str(error)


def completion(data: bytes) -> object:
    """A provider's JSON answer."""
    try:
        return read_completion(data).text.encode()
    except BackendFailedError as error:
        return str(error)


def resume_token(data: bytes) -> object:
    """Resume tokens."""
    try:
        return parse_token(_text(data))
    except ValueError as error:
        return str(error)


def filters(data: bytes) -> object:
    """The filter language."""
    return _answered(lambda: parse_filter(_text(data), fields=("model", "state")))


def names(data: bytes) -> object:
    """Resource names, model references and versions."""
    text = _text(data)
    for parse in (
        lambda: parse_name(text, "jobs"),
        lambda: parse_tenant_name(text),
        lambda: str(ModelReference.parse(text)),
        lambda: parse_version_name(text),
    ):
        _answered(parse)
    return None


def page_token(data: bytes) -> object:
    """Page tokens."""

    def parse() -> bytes:
        return PageRequest.parse(10, _text(data)).after.encode()

    return _answered(parse)


def chat_body(data: bytes) -> object:
    """The body of a chat completion."""

    def parse() -> object:
        asked = parse_chat_completion(data)
        assert len(asked.messages) <= 4096
        return [text.encode() for pair in asked.messages for text in pair]

    return _answered(parse)


def embedding_body(data: bytes) -> object:
    """The body of a request for embeddings."""
    return _answered(lambda: [text.encode() for text in parse_embedding_request(data).texts])


def generate(data: bytes) -> object:
    """A `GenerateRequest`."""

    def parse() -> object:
        request = generation_request(read_message(inference_pb2.GenerateRequest.FromString, data))
        assert isinstance(request, GenerationRequest)
        assert len(request.messages) <= MAX_MESSAGES
        return request.violations(), request.fingerprint()

    return _answered(parse)


def tar(data: bytes) -> object:
    """The headers of artifacts, as they are and with checksums that are right."""
    return _tar(data), _tar(_with_checksums(data))


def _with_checksums(data: bytes) -> bytes:
    fixed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = fixed[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(fixed)


def _tar(data: bytes) -> object:
    try:
        found = list(artifact_tar.tar_files(io.BytesIO(data)))
    except artifact_tar.TarRefusedError as error:
        return str(error).encode()
    for file in found:
        assert not file.path.is_absolute()
        assert ".." not in file.path.parts
        assert file.offset + file.size_bytes <= len(data)
    assert len({str(file.path).casefold() for file in found}) == len(found)
    return found


def manifest(data: bytes) -> object:
    """The manifest of artifacts."""
    return _answered(lambda: parse_manifest(data))


class _Connection:
    transport = Wire()


def framing(data: bytes) -> object:
    """Frames of gRPC over HTTP/1.1; the first byte selects a compression."""
    encoding = ("identity", "gzip", "deflate", "br")[data[0] % 4] if data else "identity"
    headers = {"grpc-encoding": encoding}
    request = Request("POST", "/a", headers, data[1:], False, "", True)
    exchange = Exchange(cast(Any, _Connection()), request, keep_alive=True)

    def parse() -> object:
        message = GrpcCall(exchange, cast(Any, None)).message()
        assert len(message) <= MAX_REQUEST_BYTES
        return message

    return _answered(parse)


def timeout(data: bytes) -> object:
    """The header `grpc-timeout`."""

    def parse() -> object:
        seconds = grpc_timeout.timeout_seconds({"grpc-timeout": data.decode("latin-1")})
        assert seconds is not None
        assert 0 <= seconds < float("inf")
        return seconds

    return _answered(parse)


def tensors(data: bytes) -> object:
    """Requests of the Open Inference Protocol."""

    def parse() -> object:
        head = codec.read_request(data)
        assert 0 <= head.tensors_at <= len(data)
        return head.model_name.encode(), head.request_id.encode()

    return _answered(parse)


def backend_message(data: bytes) -> object:
    """What a backend sends."""
    for parse in (codec.read_streamed, codec.read_response, triton_codec.read_chunk):
        with suppress(BackendFailedError, HeadraceError):
            parse(data)
    return None


def stream(data: bytes) -> object:
    """Frames of a backend's gRPC stream."""
    call = ServerStreamCall()
    for part in (data[: len(data) // 3], data[len(data) // 3 :]):
        if not call._ended:  # else the connection has forgotten it
            call.data_received(part)
    call.ended(None)

    async def read() -> object:
        found = b""
        with suppress(ServerStreamError):
            while messages := await call.read():
                found += b"".join(framed(message) for message in messages)
        return found

    assert data.startswith(cast(bytes, _run(read())))
    return None


def url(data: bytes) -> object:
    """URLs of providers: what is accepted is read the same when it is written again."""
    try:
        parsed = Url.parse(_text(data))
    except ValueError as error:
        return str(error)
    assert Url.parse(str(parsed)) == parsed
    assert urlsplit(str(parsed)).hostname == parsed.host
    assert parsed.is_within(parsed)
    return parsed


def identity(data: bytes) -> object:
    """The headers that name the caller; they are split at line feeds."""
    values = data.decode("latin-1").split("\n")
    keys = (TENANT_KEY, USER_KEY, SCOPES_KEY, MAX_PRIORITY_KEY)
    try:
        caller = identity_in(dict(zip(keys, values, strict=False)))
    except Unauthenticated as error:
        return sendable(error)
    assert caller.tenant.isascii()
    assert identity_in(dict(caller.metadata())) == caller
    return caller


def details(data: bytes) -> object:
    """The details of a callee's error."""
    found = from_details(Internal, "text", data)
    return found and sendable(found)


TARGETS: Mapping[str, Target] = {
    target.__name__: target
    for target in (
        http_request, http_response, events, completion, resume_token, filters, names, page_token,
        chat_body, embedding_body, generate, tar, manifest, framing, timeout, tensors,
        backend_message, stream, url, identity, details,
    )
}  # fmt: skip
