"""The files that the processes of a mesh read: keys, and the configurations of Envoy and NATS."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from pathlib import Path

from deploy import keys
from deploy.envoy import render, routes
from deploy.envoy.tls import Tls
from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local import edge_certificate
from deploy.local.edge_record import write_edge
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, address, replicas


def write_configurations(layout: Layout, ports: Mapping[str, int]) -> None:
    """Writes all of them. Keys that exist stay.

    Raises:
        CliError: a setting of the user is invalid, or a key cannot be created.
    """
    keys.ensure_keys(layout.home)
    edge = layout.edge
    try:
        if edge.certificate_file and edge.key_file:
            edge_certificate.install(edge.certificate_file, edge.key_file, layout.edge_tls)
        render.write(edge_settings(layout, ports))
    except ValueError as error:
        raise CliError(str(error)) from error
    write_edge(layout, ports)
    template = string.Template((REPOSITORY / "deploy/nats/nats.conf").read_text())
    nats_config(layout).write_text(
        template.substitute(
            listen_address=address(ports, "nats.client"),
            monitor_address=address(ports, "nats.monitor"),
            server_name="nats",
            store_dir=layout.home / "nats",
        )
    )


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
        admin_address=address(ports, "envoy.admin"),
        services={
            **{name: addresses(ports, name) for name in render.GRPC_CLUSTERS},
            **{
                cluster: addresses(ports, service, "http")
                for cluster, service in routes.HTTP_CLUSTERS.items()
            },
        },
        jwt_issuer=keys.ISSUER,
        jwt_audience=keys.AUDIENCE,
        jwks_file=keys.jwks_path(layout.home).absolute(),
        otlp_endpoint=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        trace_sample_percent=_trace_sample_percent(),
        tls=_tls(layout),
        cors=layout.edge.cors,
        limits=layout.edge.limits,
        trusted_proxies=layout.edge.trusted_proxies,
    )


def _tls(layout: Layout) -> Tls | None:
    if layout.edge.certificate_file is None:
        return None
    certificate, key = edge_certificate.installed(layout.edge_tls)
    return Tls(
        certificate_file=certificate.absolute(),
        key_file=key.absolute(),
        hsts_seconds=layout.edge.hsts_seconds,
    )


def addresses(ports: Mapping[str, int], service: str, port: str = "grpc") -> list[str]:
    """Returns the `host:port` of each replica of a service."""
    return [address(ports, f"{replica}.{port}") for replica in replicas(ports, service)]


def _trace_sample_percent() -> float:
    text = os.environ.get("HEADRACE_TRACE_SAMPLE_PERCENT") or "100"
    try:
        return float(text)
    except ValueError as error:
        raise CliError(
            f"HEADRACE_TRACE_SAMPLE_PERCENT must be a number, but it is {text!r}"
        ) from error
