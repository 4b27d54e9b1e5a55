"""The ports of a mesh."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.errors import CliError
from deploy.host import free_ports, is_free
from deploy.local.layout import Layout
from deploy.local.ports import (
    EDGE,
    choose_ports,
    inner_address,
    port_names,
    read_ports,
    replicas,
    triton_address,
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        edge_port = free.getsockname()[1]
    layout = Layout(home=tmp_path, edge_port=edge_port)
    layout.make_folders()
    return layout


def test_every_port_is_free_and_used_once(layout: Layout):
    """No two listeners share a port, and none is in the range of outgoing connections."""
    ports = choose_ports(layout)

    assert set(ports) == set(port_names(layout))
    assert len(set(ports.values())) == len(port_names(layout))
    assert all(is_free(port) for port in ports.values())
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < ephemeral for name, port in ports.items() if name != EDGE)


def test_ports_stay_the_same_until_another_program_takes_one(layout: Layout):
    """Dashboards and scripts keep working; only the taken port is replaced."""
    before = choose_ports(layout)

    with socket.socket() as other:
        other.bind(("127.0.0.1", before["registry.metrics"]))
        other.listen()
        after = choose_ports(layout)

    assert after["registry.metrics"] != before["registry.metrics"]
    assert {name for name in port_names(layout) if after[name] != before[name]} == {
        "registry.metrics"
    }
    assert read_ports(layout) == after


def test_a_taken_edge_port_is_named(layout: Layout):
    """The user chooses the edge's port, so it is not replaced silently."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", layout.edge_port))
        other.listen()

        with pytest.raises(
            CliError, match=f"cannot listen on port {layout.edge_port} of 127.0.0.1"
        ):
            choose_ports(layout)


def test_what_is_inside_has_sockets_unless_the_mesh_uses_tls(layout: Layout):
    """A mesh that runs says by its ports which it is, whatever the caller's settings are."""
    unix = choose_ports(layout)
    tls = choose_ports(replace(layout, transport="tls"))

    assert inner_address(layout, unix, "router.grpc") == f"unix:{layout.sockets}/router.grpc"
    assert triton_address(layout, unix, "triton-0") == f"unix:{layout.sockets}/triton-0/grpc:1"
    assert inner_address(layout, tls, "router.grpc") == f"127.0.0.1:{tls['router.grpc']}"
    assert triton_address(layout, tls, "triton-0") == f"127.0.0.1:{tls['triton-0.grpc']}"
    assert replicas(unix, "inference") == replicas(tls, "inference") == ["inference"]
    assert {name for name in unix if not name.endswith(".metrics")} == {EDGE, "nats.client"}


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_a_broken_port_file_is_replaced(layout: Layout, text: str):
    """After a crash during its write the mesh starts with new ports."""
    layout.ports_file.write_text(text)

    assert set(choose_ports(layout)) == set(port_names(layout))


def test_new_ports_are_adjacent(layout: Layout):
    """Meshes that start at the same time rarely collide: only if both draw the same block."""
    ports = set(choose_ports(layout).values()) - {layout.edge_port}

    assert max(ports) - min(ports) < 256  # some may be taken by others


def test_too_few_free_ports_are_an_error():
    """Rather than a wait, or a port that another program uses."""
    with pytest.raises(CliError, match=r"only .* are free"):
        free_ports(100_000)
