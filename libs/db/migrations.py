"""Migrates the tables of a service when it starts.

The revisions of a service are `services/<service>/migrations/NNNN_<what>.py`: alembic revisions
whose `revision` is the number, each following the one before.
"""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any

import sqlalchemy
import structlog
from sqlalchemy import URL, Connection, Engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from libs.db.engine import is_outage, prepare_sqlite

_log = structlog.get_logger()

OUTAGE_PAUSE_SECONDS = 0.5

_SERVICES = Path(__file__).resolve().parents[2] / "services"


async def migrate(url: str, service: str, *, folder: Path | None = None) -> None:
    """Applies the missing revisions in one transaction.

    Waits until the database is up. Several processes may start at the same time: one migrates, the
    others wait for it.

    Args:
        url: as for `create_engine`; the folder of an SQLite file is created.
        service: package in `services` with the `migrations`.
        folder: another folder with the revisions.

    Raises:
        FileNotFoundError: there are no revisions.
        sqlalchemy.exc.DBAPIError: a revision fails.
    """
    revisions = folder or _SERVICES / service / "migrations"
    table = f"{service}_schema_version"
    is_logged = False
    while True:
        try:
            return await asyncio.to_thread(_migrate, make_url(url), revisions, table)
        except DBAPIError as error:
            if not is_outage(error):
                raise
            if not is_logged:
                _log.warning("waiting for the database", error=error)
                is_logged = True
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)


def newest_revision(revisions: Path) -> str:
    """Returns the number of the last revision in a folder."""
    numbers = [path.name.partition("_")[0] for path in revisions.glob("[0-9]*_*.py")]
    if not numbers:
        raise FileNotFoundError(f"no revisions in {revisions}")
    return max(numbers)


def _migrate(url: URL, revisions: Path, table: str) -> None:
    newest = newest_revision(revisions)
    engine = _sync_engine(url)
    try:
        with engine.connect() as connection, connection.begin():
            _lock(connection, table)
            # Alembic is imported only if needed, because it costs 10 MB of memory.
            if _current_revision(connection, table) != newest:
                _upgrade(connection, revisions, table)
    finally:
        engine.dispose()


def _sync_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sqlalchemy.create_engine(url, poolclass=NullPool, hide_parameters=True)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(
        url.set(drivername="sqlite"),
        poolclass=NullPool,
        hide_parameters=True,
        execution_options={"headrace_writes": True},
    )
    prepare_sqlite(engine)
    return engine


def _lock(connection: Connection, table: str) -> None:
    # In SQLite the transaction already holds the lock of the file.
    if connection.dialect.name == "postgresql":
        key = zlib.crc32(table.encode())
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _current_revision(connection: Connection, table: str) -> str | None:
    if not sqlalchemy.inspect(connection).has_table(table):
        return None
    versions = sqlalchemy.table(table, sqlalchemy.column("version_num"))
    row = connection.execute(sqlalchemy.select(versions.c.version_num)).first()
    return None if row is None else str(row[0])


def _upgrade(connection: Connection, revisions: Path, table: str) -> None:
    from alembic.config import Config  # noqa: PLC0415  # see the caller
    from alembic.runtime.environment import EnvironmentContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    script = ScriptDirectory(str(revisions), version_locations=[revisions])

    def steps(current: Any, _context: Any) -> Any:
        return script._upgrade_revs("head", current)  # noqa: SLF001  # what `alembic upgrade` does

    with EnvironmentContext(Config(), script, fn=steps, destination_rev="head") as environment:
        environment.configure(connection=connection, version_table=table)
        environment.run_migrations()
