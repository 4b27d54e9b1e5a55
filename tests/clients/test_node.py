"""Clients in Node: `@grpc/grpc-js` with the protos, and the unmodified `openai` package."""

from __future__ import annotations

import json
import subprocess

import pytest

from deploy.triton.artifact import bundled_version
from libs.model_reference import version_name
from tests.support.clients import ROOT, TEST_SECONDS, ClientBuild
from tests.support.mesh import RunningMesh

pytestmark = [pytest.mark.clients, pytest.mark.timeout(TEST_SECONDS)]


def test_node_clients_stream_and_agree(mesh: RunningMesh):
    """Both get the same greedy answer in many parts, its usage, and errors they understand."""
    build = ClientBuild("node", "node", "npm")
    build.install_npm_packages()
    done = subprocess.run(
        ["node", "client.js", mesh.address, mesh.token(), str(ROOT / "protos")],
        cwd=build.folder, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    grpc, openai = seen["viaGrpc"], seen["viaOpenAI"]
    assert len(grpc["deltas"]) > 3
    assert "".join(grpc["deltas"]) == "".join(openai["deltas"])
    assert grpc["started"]["model_version"] == version_name("smollm2", bundled_version("smollm2"))
    assert grpc["started"]["request_id"] == grpc["final"]["request_id"]
    assert int(grpc["final"]["usage"]["completion_tokens"]) == 12  # int64: a string in JavaScript
    assert openai["usage"]["completion_tokens"] == 12
    assert openai["error"] == {"status": 404, "code": "model_not_found"}
    assert openai["dimensions"] == 384
