"""A mesh whose edge has TLS: the commands find it, and its certificate is renewed while it runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.demo import _tls_options
from deploy.local.edge_record import local_edge
from deploy.local.edge_settings import EdgeSettings
from deploy.local.status import deployment_statuses, process_statuses
from tests.support.certificates import Authority
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = pytest.mark.integration

_PATIENCE_SECONDS = 10.0
_PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True)
class TlsMesh:
    mesh: RunningMesh
    authority: Authority
    certificate_file: Path
    key_file: Path

    def renew(self) -> str:
        """Writes a new certificate in place and returns it."""
        certificate, key = self.authority.issue(names=("edge.example",))
        self.certificate_file.write_bytes(certificate)
        self.key_file.write_bytes(key)
        return certificate.decode()


@pytest.fixture(scope="module", name="tls_mesh")
def mesh_with_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsMesh]:
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    certificate, key = authority.issue(names=("edge.example",))
    files = folder / "edge.pem", folder / "edge.key"
    for file, data in zip(files, (certificate, key), strict=True):
        file.write_bytes(data)
    edge = EdgeSettings(certificate_file=files[0], key_file=files[1])
    with running_mesh(tmp_path_factory.mktemp("mesh"), models=False, edge=edge) as mesh:
        yield TlsMesh(mesh, authority, *files)


def test_commands_call_the_edge_with_tls(tls_mesh: TlsMesh) -> None:
    """Also from a shell without the variables that started the mesh."""
    layout = tls_mesh.mesh.layout
    assert local_edge(layout).url.startswith("https://127.0.0.1:")
    assert deployment_statuses(layout) == []
    assert all(process.ready for process in process_statuses(layout))
    done = subprocess.run(
        [_PROGRAMS / "headrace", "status", "--json"],
        env={"PATH": os.environ["PATH"], "HEADRACE_HOME": str(layout.home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    status = json.loads(done.stdout)
    assert (status["edge"], status["problem"]) == (local_edge(layout).url, "")


def test_the_options_that_the_demo_prints_work(tls_mesh: TlsMesh) -> None:
    """For grpcurl and for curl, on a machine that does not know the certificate's name."""
    edge = local_edge(tls_mesh.mesh.layout)
    options = _tls_options(edge)
    commands = [f"{_PROGRAMS / 'grpcurl'} {options.grpcurl} {edge.address} list"]
    if shutil.which("curl"):
        commands.append(f"curl -sf {options.curl}{options.url}/healthz")
    for command in commands:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"


def test_a_renewed_certificate_is_used(tls_mesh: TlsMesh) -> None:
    """However its files are written; commands go on."""
    host, _, port = local_edge(tls_mesh.mesh.layout).address.rpartition(":")
    for _ in range(2):
        expected = tls_mesh.renew()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while ssl.get_server_certificate((host, int(port))) != expected:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert deployment_statuses(tls_mesh.mesh.layout) == []
