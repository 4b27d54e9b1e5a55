"""The overhead of edge and inference in front of Triton, and the share of an engine's speed left.

* The null model computes nothing: calls through the mesh, and directly to the same Triton.
* SmolLM2: calls through the mesh, and to its engine in its own process, with the same settings.

Both sides of a figure run in turn, so that other load on the machine affects both.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from headrace.inference.v1 import inference_pb2
from tritonclient.grpc import service_pb2

from deploy.host import REPOSITORY
from deploy.local.ports import EDGE, read_ports, triton_address
from deploy.triton.artifact import model_files
from libs.chat.wire import text_message
from tests.bench.mesh import (
    CONDITIONS,
    VERSION,
    bench_mesh,
    deploy,
    hot_path_cpu_seconds,
    port_of,
)
from tests.bench.report import Report
from tests.bench.streams import Metadata, StreamsResult, stream
from tests.support.mesh import RunningMesh

ROUNDS = 5
FIRST_ROUNDS = 25  # with one stream each round is one sample, and noise exceeds the difference
TOKENS = 64
FIRST_TOKENS = 4
PACE_MS = 20
LLM_ROUNDS = 3
LLM_TOKENS = 64
NULL_MODEL = Path(__file__).with_name("models") / "null"
GENERATE = "/headrace.inference.v1.InferenceService/Generate"
INFER = "/inference.GRPCInferenceService/ModelStreamInfer"

T = TypeVar("T")


def run(report: Report) -> None:
    """Measures everything."""
    with bench_mesh() as mesh:
        files = {str(p.relative_to(NULL_MODEL)): p for p in NULL_MODEL.rglob("*.*") if p.is_file()}
        digest = deploy(mesh, "null", files)
        null = _Null(mesh, f"null-{VERSION}-{digest.removeprefix('sha256:')[:12]}")
        for streams, rounds in ((1, FIRST_ROUNDS), (32, ROUNDS)):
            _first_token(report, null, streams, rounds)
        for streams in (1, 32, 256):
            _rate(report, null, streams)
        deploy(mesh, "smollm2", model_files("smollm2"))
        with _engine_alone() as engine:
            for streams in (1, 4, 16):
                _efficiency(report, mesh, engine, streams)


class _Null:
    """Calls the null model through the mesh and directly."""

    def __init__(self, mesh: RunningMesh, backend_model: str) -> None:
        self.mesh = mesh
        self._backend_model = backend_model

    def through_mesh(self, streams: int, pace_ms: int, *, tokens: int = TOKENS) -> StreamsResult:
        request = _generate_request("null", str(pace_ms), tokens)
        return _stream_edge(self.mesh, [request] * streams)

    def direct(self, streams: int, pace_ms: int, *, tokens: int = TOKENS) -> StreamsResult:
        body = {"messages": [{"role": "user", "content": str(pace_ms)}], "max_tokens": tokens}
        text = json.dumps(body).encode()
        request = service_pb2.ModelInferRequest(
            model_name=self._backend_model,
            inputs=[
                service_pb2.ModelInferRequest.InferInputTensor(
                    name="request", datatype="BYTES", shape=[1]
                )
            ],
            raw_input_contents=[struct.pack("<I", len(text)) + text],
        ).SerializeToString()
        address = triton_address(self.mesh.layout, read_ports(self.mesh.layout), "triton-0")
        return _stream(address, INFER, [request] * streams, ())


def _first_token(report: Report, null: _Null, streams: int, rounds: int) -> None:
    tokens = TOKENS if streams > 1 else FIRST_TOKENS
    mesh_runs, baseline_runs = _rounds(
        lambda: null.through_mesh(streams, PACE_MS, tokens=tokens),
        lambda: null.direct(streams, PACE_MS, tokens=tokens),
        rounds=rounds,
    )
    added = [
        one.first_ms - other.first_ms for one, other in zip(mesh_runs, baseline_runs, strict=True)
    ]
    conditions = f"{streams} streams at once, {PACE_MS} ms for each token, {CONDITIONS}"
    name = f"c{streams}"
    report.add(f"relay.ttft_added_ms.{name}", statistics.median(added), "ms", conditions)
    for side, runs in (("mesh", mesh_runs), ("direct", baseline_runs)):
        value = statistics.median(one.first_ms for one in runs)
        report.add(f"relay.ttft_ms.{name}.{side}", value, "ms", conditions)


def _rate(report: Report, null: _Null, streams: int) -> None:
    cpu: list[float] = []

    def through_mesh() -> StreamsResult:
        before = hot_path_cpu_seconds(null.mesh)
        result = null.through_mesh(streams, 0)
        cpu.append(1000 * (hot_path_cpu_seconds(null.mesh) - before) / result.tokens)
        return result

    mesh_runs, baseline_runs = _rounds(through_mesh, lambda: null.direct(streams, 0))
    conditions = f"{streams} streams of {TOKENS} tokens at once, no delay, {CONDITIONS}"
    for side, runs in (("mesh", mesh_runs), ("direct", baseline_runs)):
        value = statistics.median(one.tokens_per_second for one in runs)
        report.add(f"relay.tokens_per_s.c{streams}.{side}", value, "tokens/s", conditions)
    if streams > 1:  # one stream is too short for the resolution of /proc
        value = statistics.median(cpu)
        report.add(f"relay.cpu_s_per_1k.c{streams}", value, "CPU s/1,000 tokens", conditions)


def _efficiency(
    report: Report, mesh: RunningMesh, engine: Callable[[Sequence[str]], float], streams: int
) -> None:
    prompts = [f"Tell a story about the mill number {number}." for number in range(streams)]
    requests = [_generate_request("smollm2", prompt, LLM_TOKENS) for prompt in prompts]
    mesh_runs, baseline_runs = _rounds(
        lambda: _stream_edge(mesh, requests).tokens_per_second,
        lambda: engine(prompts),
        rounds=LLM_ROUNDS,
    )
    conditions = (
        f"{streams} greedy streams of {LLM_TOKENS} tokens, same engine settings, {CONDITIONS}"
    )
    ratios = [one / other for one, other in zip(mesh_runs, baseline_runs, strict=True)]
    report.add(
        f"relay.llm_efficiency.c{streams}", statistics.median(ratios), "of engine", conditions
    )
    for side, rates in (("mesh", mesh_runs), ("engine", baseline_runs)):
        value = statistics.median(rates)
        report.add(f"relay.llm_tokens_per_s.c{streams}.{side}", value, "tokens/s", conditions)


def _rounds(
    run_mesh: Callable[[], T], run_baseline: Callable[[], T], *, rounds: int = ROUNDS
) -> tuple[list[T], list[T]]:
    run_mesh(), run_baseline()  # warm up: connections, prefix caches
    pairs = [(run_mesh(), run_baseline()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _generate_request(model: str, content: str, max_tokens: int) -> bytes:
    return inference_pb2.GenerateRequest(
        model=model,
        messages=[text_message(inference_pb2.ROLE_USER, content)],
        max_tokens=max_tokens,
    ).SerializeToString()


def _stream_edge(mesh: RunningMesh, requests: list[bytes]) -> StreamsResult:
    address = f"127.0.0.1:{port_of(mesh, EDGE)}"
    return _stream(address, GENERATE, requests, mesh.metadata(scopes="infer"), _delta_tokens)


def _stream(
    address: str,
    method: str,
    requests: list[bytes],
    metadata: Metadata,
    count: Callable[[bytes], int] = lambda message: message.count(b"word "),
) -> StreamsResult:
    work = stream(address=address, method=method, requests=requests, count=count, metadata=metadata)
    return uvloop.run(work)


def _delta_tokens(message: bytes) -> int:
    return inference_pb2.GenerateResponse.FromString(message).delta.token_count


@contextmanager
def _engine_alone() -> Iterator[Callable[[Sequence[str]], float]]:
    """Runs the engine; yields a function from prompts to tokens per second."""
    folder = REPOSITORY / "deploy" / "triton" / "models" / "smollm2"
    weights = model_files("smollm2")["1/weights.gguf"]
    command = [
        REPOSITORY / ".venv-models" / "bin" / "python",
        Path(__file__).with_name("engine_alone.py"),
        folder / "1",
        weights,
        folder / "config.pbtxt",
    ]
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as in the mesh: Linux divides the cores between sessions
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read_line() -> Any:
            line = process.stdout.readline()  # type: ignore[union-attr]  # asserted above
            assert line, "the engine ended"
            return line

        assert read_line().strip() == "ready"

        def rate(prompts: Sequence[str]) -> float:
            request = {"prompts": list(prompts), "max_tokens": LLM_TOKENS}
            process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]  # asserted
            process.stdin.flush()  # type: ignore[union-attr]  # asserted above
            result = json.loads(read_line())
            return float(result["tokens"] / result["seconds"])

        try:
            yield rate
        finally:
            process.stdin.close()
