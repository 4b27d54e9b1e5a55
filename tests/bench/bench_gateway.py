"""The overhead of the gateway: the `openai` backend in front of a mock provider.

Each load runs in the same round through the mesh and directly on the mock.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from deploy.local.ports import EDGE
from tests.bench.bare_hop import BareHop, bare_hop
from tests.bench.load import Result, closed_loop, http_request
from tests.bench.mesh import (
    CONDITIONS,
    bench_mesh,
    deploy_provider,
    hot_path_cpu_seconds,
    port_of,
)
from tests.bench.provider import CHUNKS, CompilerMissing, mock_provider
from tests.bench.report import Report
from tests.support.mesh import RunningMesh

ROUNDS = 3
PACE_MS = 20
STREAMS = 32
OPEN_LOOP_RPS = 200
HOP_REQUESTS = 1500


@dataclass(frozen=True)
class Side:
    """A way to reach the mock: through the mesh, or directly."""

    port: int
    token: str
    cpu_seconds: Callable[[], float]
    paths: dict[str, str]

    def request(self, model: str, *, stream: bool) -> bytes:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Say something about a mill wheel."}],
            "stream": stream,
        }
        path = self.paths.get(model, "/v1/chat/completions")
        return http_request(
            path=path, body=json.dumps(body).encode(), port=self.port, token=self.token
        )


@dataclass(frozen=True)
class Measured:
    """One run of one load."""

    result: Result
    cpu_seconds: float

    @property
    def cpu_ms_per_request(self) -> float:
        return 1000 * self.cpu_seconds / self.result.requests

    @property
    def tokens(self) -> int:
        return self.result.requests * CHUNKS

    @property
    def cpu_s_per_1k(self) -> float:
        return 1000 * self.cpu_seconds / self.tokens


def run(report: Report) -> None:
    """Measures everything."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="hrb") as folder,
            mock_provider(Path(folder)) as port,
            bare_hop(f"http://127.0.0.1:{port}/pace/0/v1/chat/completions") as hop,
            bench_mesh() as mesh,
        ):
            paths = {f"mock-{pace}": f"/pace/{pace}/v1" for pace in (0, PACE_MS)}
            for model, path in paths.items():
                deploy_provider(mesh, model, f"http://127.0.0.1:{port}{path}")
            sides = (_mesh_side(mesh), _direct_side(port, paths))
            _unary(report, *sides, hop)
            for measure in (_unary_single, _unary_open, _paced, _unpaced):
                measure(report, *sides)
    except CompilerMissing as missing:
        report.note(f"gateway: NOT MEASURED. {missing}")


def _mesh_side(mesh: RunningMesh) -> Side:
    return Side(
        port_of(mesh, EDGE), mesh.token(scopes="infer"), lambda: hot_path_cpu_seconds(mesh), {}
    )


def _direct_side(port: int, paths: dict[str, str]) -> Side:
    full = {model: f"{path}/chat/completions" for model, path in paths.items()}
    return Side(port, "", lambda: 0.0, full)


def _unary(report: Report, mesh: Side, direct: Side, hop: BareHop) -> None:
    hops: list[float] = []
    mesh_runs, baseline_runs = _rounds(
        mesh,
        direct,
        "mock-0",
        stream=False,
        connections=16,
        requests=4000,
        after_each=lambda: hops.append(hop.cpu_ms_per_request(HOP_REQUESTS)),
    )
    conditions = f"closed loop, 16 connections, {CONDITIONS}"
    cpu_ms = _median(mesh_runs, lambda m: m.cpu_ms_per_request)
    report.add("gateway.unary.cpu_ms", cpu_ms, "ms", conditions)
    bare = statistics.median(hops[1:])
    report.add("gateway.unary.cpu_ms.bare_hop", bare, "ms", "one bare gRPC hop, in the same rounds")
    report.add("gateway.unary.cpu_ratio", cpu_ms / bare, "", "edge and inference to the bare hop")
    for name, runs in (("", mesh_runs), (".direct", baseline_runs)):
        rps = _median(runs, lambda m: m.result.requests / m.result.seconds)
        report.add(
            f"gateway.unary.rps.c16{name}", rps, "requests/s", conditions if not name else "mock"
        )


def _unary_single(report: Report, mesh: Side, direct: Side) -> None:
    mesh_runs, baseline_runs = _rounds(
        mesh, direct, "mock-0", stream=False, connections=1, requests=600
    )
    _latencies(report, "c1", mesh_runs, baseline_runs, f"closed loop, 1 connection, {CONDITIONS}")


def _unary_open(report: Report, mesh: Side, direct: Side) -> None:
    interval = 1 / OPEN_LOOP_RPS
    mesh_runs, baseline_runs = _rounds(
        mesh, direct, "mock-0", stream=False, connections=32, requests=800, interval=interval
    )
    _latencies(
        report,
        "open",
        mesh_runs,
        baseline_runs,
        f"open loop, {OPEN_LOOP_RPS} requests/s, {CONDITIONS}",
    )


def _latencies(
    report: Report,
    name: str,
    mesh_runs: list[Measured],
    baseline_runs: list[Measured],
    conditions: str,
) -> None:
    for side, runs in (("", mesh_runs), (".direct", baseline_runs)):
        for share in (50, 99):
            value = _median(runs, lambda m: m.result.percentile_ms(share / 100))  # noqa: B023  # used at once
            report.add(f"gateway.unary.p{share}_ms.{name}{side}", value, "ms", conditions)


def _paced(report: Report, mesh: Side, direct: Side) -> None:
    mesh_runs, baseline_runs = _rounds(
        mesh, direct, f"mock-{PACE_MS}", stream=True, connections=STREAMS, requests=4 * STREAMS
    )
    conditions = f"{STREAMS} streams, {PACE_MS} ms between {CHUNKS} chunks, {CONDITIONS}"
    value = _median(mesh_runs, lambda m: m.cpu_s_per_1k)
    report.add("gateway.stream.cpu_s_per_1k.paced", value, "CPU s/1,000 tokens", conditions)
    for side, runs in (("", mesh_runs), (".direct", baseline_runs)):
        first = _median(runs, lambda m: m.result.percentile_ms(0.5, first=True))
        report.add(f"gateway.stream.first_token_p50_ms.paced{side}", first, "ms", conditions)


def _unpaced(report: Report, mesh: Side, direct: Side) -> None:
    mesh_runs, baseline_runs = _rounds(
        mesh, direct, "mock-0", stream=True, connections=STREAMS, requests=40 * STREAMS
    )
    conditions = f"{STREAMS} streams, no delay between {CHUNKS} chunks, {CONDITIONS}"
    value = _median(mesh_runs, lambda m: m.cpu_s_per_1k)
    report.add("gateway.stream.cpu_s_per_1k.unpaced", value, "CPU s/1,000 tokens", conditions)
    for side, runs in (("", mesh_runs), (".direct", baseline_runs)):
        rate = _median(runs, lambda m: m.tokens / m.result.seconds)
        report.add(f"gateway.stream.tokens_per_s{side}", rate, "tokens/s", conditions)


def _rounds(
    mesh: Side,
    direct: Side,
    model: str,
    *,
    stream: bool,
    connections: int,
    requests: int,
    interval: float = 0.0,
    after_each: Callable[[], None] = lambda: None,
) -> tuple[list[Measured], list[Measured]]:
    """Runs both sides in turn, so that other load on the machine affects both."""
    runs: tuple[list[Measured], list[Measured]] = ([], [])
    for number in range(ROUNDS + 1):
        for side, measured in zip((mesh, direct), runs, strict=True):
            before = side.cpu_seconds()
            result = _loop(
                closed_loop(
                    port=side.port,
                    request=side.request(model, stream=stream),
                    connections=connections,
                    requests=requests if number else max(connections, requests // 8),
                    count=_words,
                    interval_seconds=interval,
                )
            )
            _check(result, stream=stream)
            if number:  # the first run warms up
                measured.append(Measured(result, side.cpu_seconds() - before))
        after_each()
    return runs


def _loop(load: Coroutine[Any, Any, Result]) -> Result:
    return uvloop.run(load)


def _words(data: bytes) -> int:
    return data.count(b"word")


def _check(result: Result, *, stream: bool) -> None:
    """Fails if requests failed or tokens are missing; reads that split a word may hide a few."""
    assert result.errors == 0, f"{result.errors} requests failed"
    if stream:
        assert result.units >= 0.98 * result.requests * CHUNKS, "tokens are missing"


def _median(runs: list[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(value(one) for one in runs)
