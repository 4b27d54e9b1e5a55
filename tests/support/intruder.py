"""What another account of the machine can do to a mesh: `python -m tests.support.intruder UID`.

It reads JSON from its standard input, gives up its privileges, tries everything, and prints what
worked as JSON: lists of texts, by what was tried. Everything is imported before, because the
checkout may be unreadable for that account.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc, cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.registry.v1 import (
    registry_internal_pb2,
    registry_internal_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc

_SECONDS = 2.0
FORGED = (
    ("x-headrace-tenant", "acme"),
    ("x-headrace-user", "ann"),
    ("x-headrace-scopes", "infer read registry router billing operator internal"),
)
_HTTP = (
    ("GET", "/metrics"),
    ("GET", "/stats/prometheus"),
    ("GET", "/v1/models"),
    ("GET", "/config_dump"),
    ("GET", "/clusters"),
    ("GET", "/ready"),
    ("GET", "/stats"),
    ("POST", "/logging?level=debug"),
    ("POST", "/quitquitquit"),
    ("GET", "/varz"),
    ("GET", "/connz?subs=1"),
    ("GET", "/jsz?consumers=1"),
    ("GET", "/v2"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/x/load"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/RPC2"),
    ("GET", "/health"),
    ("GET", "/props"),
    ("GET", "/slots"),
    ("POST", "/tokenize"),
    ("POST", "/completion"),
    ("POST", "/apply-template"),
)


def main() -> None:
    """Tries everything."""
    given: dict[str, Any] = json.load(sys.stdin)
    account = int(sys.argv[1])
    if account != os.geteuid():
        os.setgroups([])
        os.setresgid(account, account, account)
        os.setresuid(account, account, account)
    attempts: dict[str, Callable[[], Iterator[str]]] = {
        "files": lambda: _files(given["files"]),
        "folders": lambda: _folders(given["folders"]),
        "writes": lambda: _writes(given["folders"]),
        "sockets": lambda: _sockets(given["sockets"]),
        "memory": lambda: _files(given["memory"]),
        "environments": lambda: _files([f"/proc/{pid}/environ" for pid in given["pids"]]),
        "arguments": lambda: _arguments(given["pids"], given["secrets"]),
        "greetings": lambda: _greetings(given["ports"]),
        "http": lambda: _http(given["ports"]),
        "grpc": lambda: _grpc([*given["ports"], *given["sockets"]], given["control_header"]),
        "bus": lambda: _bus(given["bus"], given["passwords"]),
    }
    print(json.dumps({name: sorted(set(attempt())) for name, attempt in attempts.items()}))


def _files(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError), Path(path).open("rb") as file:
            file.read(1)
            yield path


def _folders(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError):
            next(Path(path).iterdir(), None)
            yield path


def _writes(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError):
            Path(path, "intruder").write_text("x")
            Path(path, "intruder").unlink()
            yield path


def _sockets(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(path)
            yield path


def _arguments(pids: list[int], secrets: list[str]) -> Iterator[str]:
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text()
            yield from (f"{pid}: {secret}" for secret in secrets if secret in words)


def _greetings(ports: list[int]) -> Iterator[str]:
    """What servers send before a request."""
    for port in ports:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection,
        ):
            if data := connection.recv(4096):
                yield f"{port}: {data!r}"


def _http(ports: list[int]) -> Iterator[str]:
    """Paths that are answered with 200, with the identity headers of the edge."""
    for port in ports:
        for method, path in _HTTP:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request(method, path, body=b"{}", headers=dict(FORGED))
                answer = connection.getresponse()
                body = answer.read(1 << 20)
                # Servers of metrics answer every path with 200: with the metrics, or nothing.
                if answer.status == http.client.OK and body:
                    is_metrics = b"# HELP" in body or b"# TYPE" in body
                    yield f"{port} {'metrics' if is_metrics else f'{method} {path}'}"
            connection.close()


def _grpc(targets: list[int | str], control_header: tuple[str, str]) -> Iterator[str]:
    for target in targets:
        address = f"127.0.0.1:{target}" if isinstance(target, int) else f"unix:{target}"
        with grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=_SECONDS)
            except grpc.FutureTimeoutError:
                continue
            for name, call in _calls(channel, control_header):
                try:
                    call()
                except grpc.RpcError as error:
                    if error.code() not in _REFUSED:
                        yield f"{target} {name} {error.code().name}"
                else:
                    yield f"{target} {name} OK"


_REFUSED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,  # an answer of a server that speaks HTTP/1.1, or is no gRPC server
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.NOT_FOUND,
)


def _calls(
    channel: grpc.Channel, control_header: tuple[str, str]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that read or change what belongs to others, with a forged identity."""
    options: dict[str, Any] = {"metadata": FORGED, "timeout": _SECONDS}
    registry = registry_pb2_grpc.RegistryServiceStub(channel)
    internal = registry_internal_pb2_grpc.RegistryInternalServiceStub(channel)
    jobs = jobs_pb2_grpc.JobServiceStub(channel)
    cost = cost_pb2_grpc.CostServiceStub(channel)
    prices = cost_internal_pb2_grpc.CostInternalServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    triton = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    yield "ListModels", lambda: registry.ListModels(registry_pb2.ListModelsRequest(), **options)
    yield (
        "CreateModel",
        lambda: registry.CreateModel(
            registry_pb2.CreateModelRequest(model=registry_pb2.Model(name="models/forged")),
            **options,
        ),
    )
    yield (
        "WatchDeployments",
        lambda: _first(
            internal.WatchDeployments(
                registry_internal_pb2.WatchDeploymentsRequest(pool="default"), **options
            )
        ),
    )
    yield (
        "ReportBackend",
        lambda: internal.ReportBackend(
            registry_internal_pb2.ReportBackendRequest(
                deployment="deployments/x",
                backend=backend_pb2.Backend(
                    status=model_pb2.BackendStatus(id="x", state=model_pb2.BACKEND_STATE_FAILED)
                ),
            ),
            **options,
        ),
    )
    yield "ListJobs", lambda: jobs.ListJobs(jobs_pb2.ListJobsRequest(), **options)
    yield "QueryUsage", lambda: cost.QueryUsage(cost_pb2.QueryUsageRequest(), **options)
    yield (
        "WatchPrices",
        lambda: _first(prices.WatchPrices(cost_internal_pb2.WatchPricesRequest(), **options)),
    )
    yield (
        "Generate",
        lambda: list(inference.Generate(inference_pb2.GenerateRequest(model="x"), **options)),
    )
    options = {"metadata": (*FORGED, control_header), "timeout": _SECONDS}
    yield (
        "RepositoryIndex",
        lambda: triton.RepositoryIndex(service_pb2.RepositoryIndexRequest(), **options),
    )
    yield (
        "RepositoryModelLoad",
        lambda: triton.RepositoryModelLoad(
            service_pb2.RepositoryModelLoadRequest(model_name="x"), **options
        ),
    )
    yield (
        "LogSettings",
        lambda: triton.LogSettings(service_pb2.LogSettingsRequest(), **options),
    )


def _first(stream: Any) -> object:
    return next(iter(stream))


def _bus(port: int, passwords: list[str]) -> Iterator[str]:
    """Tries to speak the protocol of the bus, also with passwords that it may have seen."""
    credentials: list[dict[str, str]] = [
        {},
        {"user": "inference", "pass": "guess"},
        *({"user": user, "pass": password} for user, password in _pairs(passwords)),
    ]
    for options, secure in itertools.product(credentials, (False, True)):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=0.5) as plain,
        ):
            connection = _anonymous_tls().wrap_socket(plain) if secure else plain
            connect = json.dumps({"verbose": False, "pedantic": False, **options}).encode()
            connection.sendall(b"CONNECT " + connect + b"\r\nSUB > 1\r\nPING\r\n")
            if data := connection.recv(65536):
                yield f"{data!r} with {options}"


def _anonymous_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _pairs(passwords: list[str]) -> Iterator[tuple[str, str]]:
    for text in passwords:
        user, _, password = text.partition(":")
        yield user, password


if __name__ == "__main__":
    main()
