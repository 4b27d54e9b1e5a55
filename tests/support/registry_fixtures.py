"""Fixtures for modules that import them: a registry on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.databases import DATABASES, empty_database, shared_postgres
from tests.support.registry import RegistryClient, serving_registry


@pytest_asyncio.fixture(name="postgres", scope="module", loop_scope="module")
async def module_postgres() -> AsyncIterator[str]:
    async with shared_postgres() as url:
        yield url


@pytest.fixture(name="url", params=DATABASES)
async def database_url(request: pytest.FixtureRequest, postgres: str, tmp_path: Path) -> str:
    return await empty_database(request.param, folder=tmp_path, postgres_url=postgres)


@pytest.fixture(name="registry")
async def running_registry(url: str, tmp_path: Path) -> AsyncIterator[RegistryClient]:
    async with serving_registry(url, tmp_path) as client:
        yield client
