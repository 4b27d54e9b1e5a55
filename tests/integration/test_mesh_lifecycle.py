"""Starting and stopping meshes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.local.lifecycle import start, stop
from deploy.local.ports import read_ports
from deploy.local.session import mesh_members
from deploy.local.supervisor import process_states
from deploy.triton.artifact import bundled_version
from libs.model_reference import at_version
from tests.support.mesh import RunningMesh, SilentProgress, running_mesh

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def _pids(mesh: RunningMesh) -> dict[str, int]:
    return {name: state.pid for name, state in process_states(mesh.layout).items()}


def test_two_meshes_run_side_by_side(mesh: RunningMesh, tmp_path: Path):
    """Each has its own ports, processes and state; stopping one does not affect the other."""
    before = _pids(mesh)

    with running_mesh(tmp_path / "other", models=False) as other:
        members = mesh_members(other.layout)
        assert not set(read_ports(other.layout).values()) & set(read_ports(mesh.layout).values())
        assert len(members) > len(other.processes)  # and the supervisor
        assert not {process.pid for process in members} & set(before.values())

        result = stop(other.layout)

    assert result.process_count >= len(members)
    assert not any(process.is_running() for process in members)
    assert not mesh_members(other.layout)
    assert _pids(mesh) == before


def test_starting_a_running_mesh_changes_nothing(mesh: RunningMesh):
    """`up` may be called at any time."""
    before = _pids(mesh)

    start(mesh.layout, SilentProgress())

    assert _pids(mesh) == before


def test_status_shows_all_processes_and_deployments(mesh: RunningMesh):
    """As a table for people, and as JSON for scripts."""
    headrace = [sys.executable, "-m", "cli", "status"]
    environment = {**os.environ, "HEADRACE_HOME": str(mesh.layout.home), "COLUMNS": "200"}

    table = subprocess.run(headrace, env=environment, capture_output=True, text=True, check=True)
    printed = subprocess.run(
        [*headrace, "--json"], env=environment, capture_output=True, check=True
    )

    status = json.loads(printed.stdout)
    assert status["ready"]
    assert not status["problem"]
    assert {p["name"]: p["pid"] for p in status["processes"]} == _pids(mesh)
    assert all(p["ready"] and p["memory_bytes"] > 2**20 for p in status["processes"])
    assert all(p["version"] != "?" and p["name"] in table.stdout for p in status["processes"])
    deployed = {d["model_version"]: d["backends"] for d in status["deployments"]}
    assert {at_version(model, bundled_version(model)) for model in ("smollm2", "minilm")} <= set(
        deployed
    )
    assert deployed["minilm@1.0.0"] == [{"id": "triton-0", "state": "ready", "message": ""}]
    assert "minilm@1.0.0" in table.stdout


def test_a_mesh_whose_supervisor_was_killed_starts_again(tmp_path: Path):
    """Its processes are stopped first: nothing runs twice, and the ports stay the same."""
    with running_mesh(tmp_path / "mesh", models=False) as mesh:
        ports = read_ports(mesh.layout)
        members = mesh_members(mesh.layout)
        (supervisor,) = [process for process in members if process.pid == os.getsid(process.pid)]
        supervisor.send_signal(signal.SIGKILL)
        psutil.wait_procs([supervisor], timeout=5)
        time.sleep(0.5)  # so that processes that end with the supervisor have ended
        assert mesh_members(mesh.layout), "the services must survive the supervisor"

        start(mesh.layout, SilentProgress())

        assert not [process for process in members if process.is_running()]
        assert read_ports(mesh.layout) == ports
