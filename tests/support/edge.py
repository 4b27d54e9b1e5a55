"""Runs a real Envoy with the configuration of a mesh, in front of test servers."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from deploy import keys
from deploy.envoy.render import CLUSTERS, Edge, argv, write
from deploy.envoy.routes import STREAM_CLUSTERS
from deploy.host import PROGRAMS
from deploy.local.edge_settings import host_port
from libs.clock import SystemClock
from libs.http1 import HttpServer
from libs.rpc.access import required_scope
from libs.rpc.grpc_http1 import GrpcHttp1Handler
from libs.rpc.http_api import HttpApi, HttpRoute
from libs.rpc.http_dialect import HttpDialect
from libs.rpc.server import RpcServer

START_SECONDS = 20.0
STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02

# Nothing listens on the discard port of the loopback interface: connections are refused at once.
NOWHERE = "127.0.0.1:9"


@dataclass(frozen=True)
class RunningEdge:
    """An edge that accepts calls.

    Attributes:
        home: folder of its keys and files.
        address: `host:port` for callers.
        metrics: URL of what Prometheus reads.
        admin: URL of Envoy's admin interface.
        log: standard output, one line of JSON for each request.
        pid: the process of Envoy.
        root: what clients trust, PEM; empty: the edge speaks without TLS.
    """

    home: Path
    address: str
    metrics: str
    admin: str
    log: Path
    pid: int
    root: str = ""

    @property
    def url(self) -> str:
        return f"{'https' if self.root else 'http'}://{self.address}"

    def token(self, **claims: Any) -> str:
        """Signs a token; by default of tenant `acme` and user `ann`, with all scopes."""
        defaults = {"tenant": "acme", "user": "ann", "scopes": "infer read registry billing"}
        return keys.mint_token(self.home, **{**defaults, **claims})

    def bearer(self, **claims: Any) -> dict[str, str]:
        """Returns the authorization header with a token, for HTTP and gRPC."""
        return {"authorization": f"Bearer {self.token(**claims)}"}

    def metadata(self, **claims: Any) -> tuple[tuple[str, str], ...]:
        """Returns `bearer` as gRPC metadata."""
        return tuple(self.bearer(**claims).items())

    def channel(self) -> grpc.aio.Channel:
        if self.root:
            trusting = grpc.ssl_channel_credentials(self.root.encode())
            return grpc.aio.secure_channel(self.address, trusting)
        return grpc.aio.insecure_channel(self.address)

    def session(self) -> aiohttp.ClientSession:
        trusting = ssl.create_default_context(cadata=self.root) if self.root else True
        return aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(ssl=trusting))

    async def requests_logged(self, count: int) -> list[dict[str, Any]]:
        """Waits until the log has this many requests and returns them."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                lines = [json.loads(line) for line in self.log.read_text().splitlines()]
                requests = [line for line in lines if line.get("event") == "request"]
                if len(requests) >= count:
                    return requests
                await asyncio.sleep(_POLL_SECONDS)

    async def cluster_is_healthy(self, cluster: str) -> None:
        """Waits until a host of a cluster passes its health check."""
        query = f"{self.admin}/stats?format=json&filter=^cluster.{cluster}.membership_healthy$"
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as http:
            while True:
                async with http.get(query) as response:
                    (stat,) = (await response.json())["stats"]
                if stat["value"] > 0:
                    return
                await asyncio.sleep(_POLL_SECONDS)


@asynccontextmanager
async def running_edge(
    home: Path,
    services: Mapping[str, Sequence[str]],
    *,
    root: str = "",
    listen_address: str = "127.0.0.1:0",
    **settings: Any,
) -> AsyncIterator[RunningEdge]:
    """Runs an edge on free ports. Clusters without an address refuse connections.

    `root` is the authority of the certificate in the setting `listener_tls`.
    """
    edge = Edge(
        folder=home / "run",
        jwt_issuer=keys.ISSUER,
        jwt_audience=keys.AUDIENCE,
        jwks_file=keys.jwks_path(home),
        listen_address=listen_address,
        admin_address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
        services={
            # One server has all methods, if it is not said otherwise.
            name: services.get(name) or services.get(STREAM_CLUSTERS.get(name, ""), [NOWHERE])
            for name in CLUSTERS
        },
        **settings,
    )
    keys.ensure_keys(home)
    write(edge)
    log, errors, admin_file = (home / "run" / name for name in ("edge.log", "edge.err", "admin"))
    with log.open("wb") as stdout, errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv(edge, program=str(PROGRAMS / "envoy")),
            "--admin-address-path",
            str(admin_file),
            stdout=stdout,
            stderr=stderr,
        )
    try:
        async with asyncio.timeout(START_SECONDS):
            admin, listeners = await _ready(process, admin_file)
        yield RunningEdge(
            home=home,
            address=listeners["edge"],
            metrics=f"http://{listeners['metrics']}",
            admin=admin,
            log=log,
            pid=process.pid,
            root=root,
        )
    except TimeoutError as error:
        raise AssertionError(f"Envoy is not ready: {errors.read_text()[-2000:]}") from error
    finally:
        await _end(process)


@asynccontextmanager
async def serving(
    *register: Callable[[grpc.aio.Server], None],
    address: str = "127.0.0.1:0",
    scope_of: Callable[[str], str] = required_scope,
) -> AsyncIterator[str]:
    """Runs a gRPC server with the interceptors of the mesh; yields its `host:port`."""
    server = RpcServer(address, clock=SystemClock(), scope_of=scope_of)
    for each in register:
        each(server.grpc)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(drain_seconds=0)


@asynccontextmanager
async def serving_http(
    routes: Iterable[HttpRoute] = (),
    grpc_methods: Iterable[GrpcHttp1Handler] = (),
    *,
    address: str = "127.0.0.1:0",
    dialect: HttpDialect | None = None,
) -> AsyncIterator[str]:
    """Runs the mesh's own HTTP server with some routes and methods; yields its `host:port`."""
    clock = SystemClock()
    api = HttpApi(
        routes=routes,
        grpc_methods=grpc_methods,
        is_ready=lambda: True,
        clock=clock,
        dialect=dialect,
    )
    server = HttpServer(address, api, drain_seconds=0, clock=clock)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop()


async def _ready(
    process: asyncio.subprocess.Process, admin_file: Path
) -> tuple[str, dict[str, str]]:
    """Returns the URL of the admin interface and the listeners' addresses by name, once live."""
    async with aiohttp.ClientSession() as http:
        while process.returncode is None:
            with suppress(OSError, aiohttp.ClientError):
                admin = f"http://{await asyncio.to_thread(admin_file.read_text)}"
                async with http.get(f"{admin}/ready") as response:
                    live = response.status == 200
                async with http.get(f"{admin}/listeners?format=json") as response:
                    listeners = (await response.json()).get("listener_statuses", [])
                if live and listeners:
                    return admin, {each["name"]: _host_and_port(each) for each in listeners}
            await asyncio.sleep(_POLL_SECONDS)
    raise TimeoutError


def _host_and_port(listener: dict[str, Any]) -> str:
    found = listener["local_address"]["socket_address"]
    return host_port(found["address"], found["port_value"])


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
