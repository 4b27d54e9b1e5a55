"""One Python hop without features: gRPC in, aiohttp out. Measures the speed of a machine.

`bare_hop` runs this module as a server during a measurement.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import uvloop
from google.api import httpbody_pb2

from tests.bench.proc import cpu_seconds

_SERVICE, _METHOD = "headrace.bench.BareHop", "Pass"
_CALLERS = 16


@dataclass(frozen=True)
class BareHop:
    """A running hop."""

    port: int
    pid: int

    def cpu_ms_per_request(self, requests: int) -> float:
        """Sends requests, 16 at a time, and returns the CPU time of the hop for each."""
        uvloop.run(self._load(_CALLERS))
        before = cpu_seconds([self.pid])
        uvloop.run(self._load(requests))
        return 1000 * (cpu_seconds([self.pid]) - before) / requests

    async def _load(self, requests: int) -> None:
        question = {"role": "user", "content": "Say something about a mill wheel."}
        body = json.dumps({"model": "mock", "messages": [question], "stream": False}).encode()
        message = httpbody_pb2.HttpBody(data=body).SerializeToString()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            call: Any = channel.unary_unary(f"/{_SERVICE}/{_METHOD}", None, None)
            left = iter(range(requests))

            async def caller() -> None:
                for _ in left:
                    await call(message)

            await asyncio.gather(*(caller() for _ in range(_CALLERS)))


@contextmanager
def bare_hop(url: str) -> Iterator[BareHop]:
    """Runs a hop in front of the chat completions of a provider."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare_hop", url], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield BareHop(int(process.stdout.readline()), process.pid)
        finally:
            process.terminate()


async def _serve(url: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def pass_on(request: httpbody_pb2.HttpBody, _context: Any) -> httpbody_pb2.HttpBody:
            headers = {"content-type": "application/json"}
            async with session.post(url, data=request.data, headers=headers) as response:
                return httpbody_pb2.HttpBody(data=await response.read())

        handler = grpc.unary_unary_rpc_method_handler(
            pass_on,
            request_deserializer=httpbody_pb2.HttpBody.FromString,
            response_serializer=httpbody_pb2.HttpBody.SerializeToString,
        )
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
