"""A generated client in TypeScript: `protoc-gen-es` and Connect."""

from __future__ import annotations

import pytest

from tests.support.clients import TEST_SECONDS, ClientBuild
from tests.support.mesh import RunningMesh

pytestmark = [pytest.mark.clients, pytest.mark.timeout(TEST_SECONDS)]


def test_typescript_client_streams_and_resumes(mesh: RunningMesh):
    build = ClientBuild("typescript", "node", "npm")
    build.install_npm_packages()
    build.generate()
    build.run("npx", "tsc")
    build.check_streams(mesh, "node", "out/client.js")
