"""When the tests of clients in other languages are skipped, and when they fail."""

from __future__ import annotations

import pytest

from tests.support import clients
from tests.support.clients import ClientBuild


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "tests/clients/some").mkdir(parents=True)
    monkeypatch.setattr(clients, "ROOT", tmp_path)


def test_a_missing_tool_skips():
    with pytest.raises(pytest.skip.Exception, match="the some client needs headrace-no-tool"):
        ClientBuild("some", "sh", "headrace-no-tool")


@pytest.mark.parametrize(
    "output",
    [
        "go: example.com/x@v1.0.0: dial tcp: lookup example.com: network is unreachable",
        "go: go.mod requires go >= 1.26.0 (running go 1.22.0)",
        "[ERROR] Could not transfer artifact io.grpc:grpc-bom:pom:1.68.1 from/to central",
        "[6] Could not resolve hostname (Could not resolve host: example.com)",
        "npm error code EAI_AGAIN",
    ],
)
def test_an_unreachable_registry_or_an_old_tool_skips(output):
    with pytest.raises(pytest.skip.Exception, match="the some client cannot be built here"):
        ClientBuild("some").run("sh", "-c", f"echo '{output}'; exit 1")


def test_a_build_beyond_its_bound_skips(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clients, "BUILD_SECONDS", 0.2)
    with pytest.raises(pytest.skip.Exception, match="was not built within"):
        ClientBuild("some").run("sh", "-c", "sleep 30; true")


def test_any_other_failure_fails():
    with pytest.raises(AssertionError, match="syntax error"):
        ClientBuild("some").run("sh", "-c", "echo 'syntax error'; exit 1")
