"""Clients in Node: `@grpc/grpc-js` with the protos, and the unmodified `openai` package."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.clients

FOLDER = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"
INSTALL_SECONDS = 90


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients, installed outside of the tree."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install the clients here: {error}")
    return folder


def test_node_clients_stream_and_agree(mesh: RunningMesh, installed: Path):
    """Both get the same greedy answer in many parts, its usage, and errors they understand."""
    done = subprocess.run(
        ["node", "client.js", mesh.address, mesh.token(), str(PROTOS)],
        cwd=installed, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    grpc, openai = seen["viaGrpc"], seen["viaOpenAI"]
    assert len(grpc["deltas"]) > 3
    assert "".join(grpc["deltas"]) == "".join(openai["deltas"])
    assert grpc["started"]["model_version"] == "models/smollm2/versions/1.0.0"
    assert grpc["started"]["request_id"] == grpc["final"]["request_id"]
    assert int(grpc["final"]["usage"]["completion_tokens"]) == 12  # int64: a string in JavaScript
    assert openai["usage"]["completion_tokens"] == 12
    assert openai["error"] == {"status": 404, "code": "model_not_found"}
    assert openai["dimensions"] == 384
