"""A generated client in Go: the plugins of Buf and `google.golang.org/grpc`."""

from __future__ import annotations

import pytest

from tests.support.clients import TEST_SECONDS, ClientBuild
from tests.support.mesh import RunningMesh

pytestmark = [pytest.mark.clients, pytest.mark.timeout(TEST_SECONDS)]


def test_go_client_streams_and_resumes(mesh: RunningMesh):
    build = ClientBuild("go", "go")
    build.run("go", "mod", "download")
    build.generate()
    build.run("go", "build", "-o", "client", ".")
    build.check_streams(mesh, "./client")
