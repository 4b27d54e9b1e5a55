"""Fixtures of the tests of attacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.mesh import RunningMesh, running_mesh


@pytest.fixture(scope="session")
def bare_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh without models: all but the engines answers, and nothing takes long."""
    with running_mesh(tmp_path_factory.mktemp("bare"), models=False) as mesh:
        yield mesh
