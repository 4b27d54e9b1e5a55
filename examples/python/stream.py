"""Streams an answer, continues it after an interruption, and reads why a call failed.

    export TOKEN=$(.venv/bin/headrace token)
    .venv/bin/python examples/python/stream.py "Name three rivers."

`headrace.inference.v1` is generated from `protos`, here by `make protos` into `libs/gen`.
"""

from __future__ import annotations

import os
import sys
import time

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

TRIES = 5


def reason_of(error: grpc.RpcError) -> str:
    """Returns the reason in the error's `ErrorInfo`; empty if it did not come from Headrace."""
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    found = status and any(detail.Unpack(info) for detail in status.details)
    return info.reason if found else ""


def stream(
    service: inference_pb2_grpc.InferenceServiceStub,
    request: inference_pb2.GenerateRequest,
    token: str,
) -> inference_pb2.Final | None:
    """Prints the answer as it arrives and returns its last message."""
    metadata = [("authorization", f"Bearer {token}")]
    for attempt in range(TRIES):
        try:
            for response in service.Generate(request, metadata=metadata, timeout=60):
                if response.HasField("delta"):
                    print(response.delta.text, end="", flush=True)
                    request.resume_from = response.delta.resume_token  # for the next try
                elif response.HasField("final"):
                    return response.final
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    return None


def main() -> None:
    """Asks the question of the command line."""
    address = os.environ.get("HEADRACE_ADDRESS", "127.0.0.1:8080")
    question = inference_pb2.Message(
        role=inference_pb2.ROLE_USER, parts=[inference_pb2.Part(text=sys.argv[1])]
    )
    request = inference_pb2.GenerateRequest(
        model=os.environ.get("MODEL", "smollm2"), messages=[question], max_tokens=64
    )
    with grpc.insecure_channel(address) as channel:
        service = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            final = stream(service, request, os.environ["TOKEN"])
        except grpc.RpcError as error:
            sys.exit(f"{error.code().name} {reason_of(error)}: {error.details()}")
    if final:
        print(f"\n{final.usage.completion_tokens} tokens, {final.cost_nano_usd} nano-dollars")


if __name__ == "__main__":
    main()
