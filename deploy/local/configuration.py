"""The files that the processes of a mesh read: keys, and the configurations of Envoy and NATS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deploy import keys
from deploy.certificates import ensure_certificates, tls_files
from deploy.envoy import render, routes
from deploy.envoy.tls import Tls
from deploy.errors import CliError
from deploy.local import edge_certificate
from deploy.local.edge_record import write_edge
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, address, inner_address, replicas
from deploy.nats import render as nats_render
from deploy.nats.users import SYSTEM_USER, USERS


def write_configurations(layout: Layout, ports: Mapping[str, int]) -> None:
    """Writes all of them. Keys that exist stay.

    Raises:
        CliError: a setting of the user is invalid, or a key cannot be created.
    """
    keys.ensure_keys(layout.home)
    keys.ensure_triton_control_key(layout.home)
    ensure_certificates(layout.home)
    edge = layout.edge
    try:
        if edge.certificate_file and edge.key_file:
            edge_certificate.install(edge.certificate_file, edge.key_file, layout.edge_tls)
        render.write(edge_settings(layout, ports))
    except ValueError as error:
        raise CliError(str(error)) from error
    write_edge(layout, ports)
    bus = nats_render.Bus(
        listen_address=address(ports, "nats.client"),
        server_name="nats",
        store_dir=layout.home / "nats",
        passwords=keys.ensure_nats_credentials(layout.home, [*USERS, SYSTEM_USER]),
        tls=tls_files(layout.home.absolute(), "nats"),
    )
    _write_private(nats_config(layout), nats_render.config(bus))


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # an existing file would keep its mode
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def nats_config(layout: Layout) -> Path:
    """Returns the file of the NATS server's configuration."""
    return layout.run / "nats.conf"


def edge_settings(layout: Layout, ports: Mapping[str, int]) -> render.Edge:
    """Returns the settings of this mesh's edge.

    Raises:
        CliError: a setting of the user is invalid.
    """
    return render.Edge(
        folder=layout.run.absolute(),
        listen_address=layout.edge.listen_address(ports[EDGE]),
        admin_address=inner_address(layout, ports, "envoy.admin"),
        metrics_address=address(ports, "envoy.metrics"),
        services={
            **{name: addresses(layout, ports, name) for name in render.GRPC_CLUSTERS},
            **{
                cluster: addresses(layout, ports, service, "http")
                for cluster, service in routes.HTTP_CLUSTERS.items()
            },
            **{
                cluster: addresses(layout, ports, service, "streams")
                for cluster, service in routes.STREAM_CLUSTERS.items()
            },
        },
        tls=tls_files(layout.home.absolute(), "envoy"),
        jwt_issuer=keys.ISSUER,
        jwt_audience=keys.AUDIENCE,
        jwks_file=keys.jwks_path(layout.home).absolute(),
        otlp_endpoint=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        trace_sample_percent=_trace_sample_percent(),
        listener_tls=_listener_tls(layout),
        cors=layout.edge.cors,
        limits=layout.edge.limits,
        trusted_proxies=layout.edge.trusted_proxies,
    )


def _listener_tls(layout: Layout) -> Tls | None:
    if layout.edge.certificate_file is None:
        return None
    certificate, key = edge_certificate.installed(layout.edge_tls)
    return Tls(
        certificate_file=certificate.absolute(),
        key_file=key.absolute(),
        hsts_seconds=layout.edge.hsts_seconds,
    )


def addresses(
    layout: Layout, ports: Mapping[str, int], service: str, protocol: str = "grpc"
) -> list[str]:
    """Returns the address of each replica of a service."""
    return [inner_address(layout, ports, f"{each}.{protocol}") for each in replicas(ports, service)]


def _trace_sample_percent() -> float:
    text = os.environ.get("HEADRACE_TRACE_SAMPLE_PERCENT") or "100"
    try:
        return float(text)
    except ValueError as error:
        raise CliError(
            f"HEADRACE_TRACE_SAMPLE_PERCENT must be a number, but it is {text!r}"
        ) from error
