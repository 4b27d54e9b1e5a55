"""Examples for each target, from which inputs are made."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence

from google.rpc import status_pb2
from headrace.inference.v1 import inference_pb2
from tritonclient.grpc import service_pb2

from libs.chat.resume import token_prefix
from libs.errors import NotFound
from libs.rpc.framing import framed
from libs.rpc.status import to_status

_HEAD = b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
_CHAT = {
    "model": "smollm2@1.0.0",
    "messages": [
        {"role": "system", "content": "a\ud83d\ude00b"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ],
    "max_tokens": 16,
    "temperature": 0.5,
    "top_p": 1,
    "seed": 7,
    "stop": ["x", "y"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
    "metadata": {"a": None},
}
_CHUNK = {
    "choices": [{"index": 0, "delta": {"content": "ab"}, "finish_reason": None}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {}},
}


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _tar(form: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        last = "1/" + ("n" * 60 if form == tarfile.USTAR_FORMAT else "né" * 60)
        for name in ("headrace.json", "config.pbtxt", "1/model.py", last):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return made.getvalue()[: 512 * 24]


_INFER = service_pb2.ModelInferRequest(
    model_name="minilm",
    model_version="1.0.0",
    id="a",
    inputs=[
        service_pb2.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[1, 1])
    ],
    outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="embedding")],
    raw_input_contents=[struct.pack("<I", 1) + b"a"],
).SerializeToString()
_ANSWER = service_pb2.ModelInferResponse(
    model_name="a",
    outputs=[
        service_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype="INT32", shape=[1])
        for name in ("text", "token_ids", "final")
    ],
    raw_output_contents=[b"\1\0\0\0a", b"\1\0\0\0", struct.pack("<I", 2) + b"{}"],
)
_GENERATE = inference_pb2.GenerateRequest(
    request_id="0190f5b2-0000-7000-8000-000000000000",
    model="smollm2",
    messages=[
        inference_pb2.Message(
            role=inference_pb2.ROLE_USER, parts=[inference_pb2.Part(text="Hello")]
        )
    ],
    max_tokens=5,
    temperature=0.5,
    seed=1,
    stop=["x"],
    priority=3,
).SerializeToString()
_PACKED = gzip.compress(_GENERATE, mtime=0)

EXAMPLES: Mapping[str, Sequence[bytes]] = {
    "http_request": (
        _HEAD + b"content-length: 4\r\n\r\nabcd",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n4;a=b\r\nabcd\r\n0\r\nx: y\r\n\r\n",
        _HEAD + b"expect: 100-continue\r\ncontent-length: 1\r\n\r\na" * 2,
        _HEAD + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 1\r\n\r\na",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\ngrpc-timeout: 1S\r\ncookie: a\r\ncookie: b\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    "http_response": (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n0\r\na: b\r\n\r\n"
        ),
        b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\nrest",
        b"HTTP/1.1 101 Switching\r\nupgrade: a\r\n\r\n",
    ),
    "events": (
        _event(_CHUNK) * 3 + b": ping\n\n" + b"data: [DONE]\n\n",
        _event({"choices": [{"delta": {"content": "\\ud83d"}}]})
        + _event({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        _event({"error": {"message": "a", "code": 1}}),
    ),
    "completion": (
        json.dumps(
            {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {}}
        ).encode(),
    ),
    "resume_token": (f"{token_prefix(123456789, '1.0.0-rc.1')}17".encode(),),
    "filters": (b'model = "models/a" AND state = "a\\"b\\\\"', b'state="x"'),
    "names": (b"jobs/a-1", b"tenants/acme", b"models/a/versions/1.0.0-rc.1+b", b"smollm2@1.0.0"),
    "page_token": (b"am9icy9h", b"YQ==", b"_-8="),
    "chat_body": (json.dumps(_CHAT).encode(), b'{"model":"a","messages":[]}'),
    "embedding_body": (
        b'{"model":"minilm","input":["a","b"],"encoding_format":"base64","dimensions":384}',
        b'{"model":"a","input":"b","user":null}',
    ),
    "generate": (_GENERATE,),
    "tar": tuple(map(_tar, (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))),
    "manifest": (
        (
            b'{"kind":"chat","context_tokens":10,"max_output_tokens":5,"max_concurrent_requests":1,'
            b'"provider":{"base_url":"https://a.b/v1","model":"m","api_key_name":"k"}}'
        ),
        b'{"kind":"embedding","dimensions":4,"max_input_tokens":8}',
    ),
    "framing": (
        b"\0" + framed(_GENERATE),
        b"\1\1" + struct.pack(">I", len(_PACKED)) + _PACKED,
        b"\2\1" + struct.pack(">I", len(zlib.compress(_GENERATE))) + zlib.compress(_GENERATE),
    ),
    "timeout": (b"30S", b"99999999n", b"1H"),
    "tensors": (_INFER,),
    "backend_message": (
        _ANSWER.SerializeToString(),
        service_pb2.ModelStreamInferResponse(infer_response=_ANSWER).SerializeToString(),
        service_pb2.ModelStreamInferResponse(
            error_message='{"reason":"INVALID_FIELD","message":"a","metadata":{"field":"b"}}'
        ).SerializeToString(),
    ),
    "stream": (framed(b"a") + framed(b"") * 3 + framed(b"b" * 300),),
    "url": (
        b"https://api.example.com/v1",
        b"http://127.0.0.1:8080/a/b/",
        b"https://[::ffff:7f00:1]:443/",
        "https://b\u00fccher.example./a%2fb".encode(),
        b"http://0x7f.1/..;/",
    ),
    "identity": (b"acme\nann@example.com\ninfer read\n5", b"a\nb\n\n0"),
    "details": (
        to_status(NotFound.of_resource("models/a")).SerializeToString(),
        status_pb2.Status(code=3, message="a").SerializeToString(),
    ),
}
TOKENS: Mapping[str, Sequence[bytes]] = {
    "http_request": (
        b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n", b"HTTP/1.0", b"0\r\n\r\n",
        b"transfer-encoding: gzip\r\n", b"upgrade: h2c\r\n", b"expect: 100-continue\r\n",
        b"ffffffffffffffff\r\n", b"host: b\r\n", b"connection: close\r\n",
    ),
    "http_response": (
        b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n", b"HTTP/1.0", b"0\r\n\r\n",
        b"content-encoding: gzip\r\n", b"HTTP/1.1 103 Early\r\n\r\n",
    ),
    "events": (b"data: ", b"\n\n", b'"content": "', b"[DONE]", b"\\ud83d", b"\\ude00"),
    "chat_body": (b'"content"', b'"role"', b'"messages"', b'"\\udfff": 1,', b'"tools": [],'),
    "tar": (b"path=", b"size=", b"GNU.sparse.major=1", b"0000755", b"ustar\x0000", bytes(512)),
    "filters": (b" AND ", b'"', b"\\", b"model", b"state", b" = "),
    "names": (b"models/", b"/versions/", b"@", b"tenants/", b"1.0.0"),
}  # fmt: skip
