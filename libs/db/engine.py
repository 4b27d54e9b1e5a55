"""Engines and transactions.

SQLite has one writer at a time. Writers of one process wait for each other in asyncio, which is
cheap and fair; writers of different processes wait in `BEGIN IMMEDIATE`, so a transaction that has
started never fails because of another writer.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, event, make_url
from sqlalchemy import create_engine as create_sync_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from libs.errors import Unavailable

SQLITE_CONNECTIONS = 4  # each has a thread
POSTGRESQL_CONNECTIONS = 10
CONNECTION_WAIT_SECONDS = 10
# Waiting time for writers of other processes; writers of this process wait in asyncio.
SQLITE_BUSY_TIMEOUT_MILLIS = 5_000
# For each connection; mostly the newest rows are read.
SQLITE_CACHE_KIB = 512
CONNECT_TIMEOUT_SECONDS = 5
RETRY_AFTER_SECONDS = 1.0

_WRITES = "headrace_writes"
_SQLITE_OUTAGES = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR")

_writing: WeakKeyDictionary[AsyncEngine, asyncio.Lock] = WeakKeyDictionary()
_twins: WeakKeyDictionary[AsyncEngine, Engine] = WeakKeyDictionary()

T = TypeVar("T")


def create_engine(url: str) -> AsyncEngine:
    """Makes an engine for `sqlite+aiosqlite:///path` or `postgresql+psycopg://…`.

    SQLite: write-ahead log, each commit on disk before it returns, foreign keys enforced. What is
    deleted is overwritten with zeros; `erase_log` removes it from the write-ahead log.
    """
    parsed = make_url(url)
    engine = create_async_engine(parsed, **_pool_settings(parsed))
    if parsed.get_backend_name() == "sqlite":
        prepare_sqlite(engine.sync_engine)
        _writing[engine] = asyncio.Lock()
    return engine


def _pool_settings(url: URL) -> dict[str, Any]:
    # hide_parameters: errors do not contain the values of rows.
    shared = {
        "max_overflow": 0,
        "pool_timeout": CONNECTION_WAIT_SECONDS,
        "hide_parameters": True,
    }
    if url.get_backend_name() == "sqlite":
        timeout = {"timeout": SQLITE_BUSY_TIMEOUT_MILLIS / 1000}
        return {**shared, "pool_size": SQLITE_CONNECTIONS, "connect_args": timeout}
    return {
        **shared,
        "pool_size": POSTGRESQL_CONNECTIONS,
        "pool_pre_ping": True,
        "connect_args": {"connect_timeout": CONNECT_TIMEOUT_SECONDS},
    }


def prepare_sqlite(engine: Any) -> None:
    """Applies the settings to each connection, and starts transactions explicitly."""
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Opens a transaction for reads and writes; on SQLite one at a time. Keep it short.

    Raises:
        Unavailable: the database cannot be reached, or is busy for too long.
    """
    lock = _writing.get(engine)
    with _reached(engine.url):
        if lock is None:
            async with engine.begin() as connection:
                yield connection
            return
        async with lock, engine.connect() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                yield connection


async def transaction_in_thread(engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
    """Calls `work` in a transaction in one thread, and returns its result.

    It is faster than `transaction` for many short statements, which there pass to a thread one by
    one. Cancelling the caller does not stop the work.

    Raises:
        Unavailable: the database cannot be reached, or is busy for too long.
    """
    twin = _twin(engine)

    def run() -> T:
        with twin.begin() as connection:
            return work(connection)

    with _reached(engine.url):
        lock = _writing.get(engine)
        if lock is None:
            return await asyncio.to_thread(run)
        async with lock:
            return await asyncio.to_thread(run)


def _twin(engine: AsyncEngine) -> Engine:
    """Returns the synchronous engine of the same database, disposed of with the first."""
    twin = _twins.get(engine)
    if twin is None:
        url = engine.url
        if url.get_backend_name() == "sqlite":
            url = url.set(drivername="sqlite")
        twin = _twins[engine] = create_sync_engine(
            url, execution_options={_WRITES: True}, **_pool_settings(url)
        )
        if url.get_backend_name() == "sqlite":
            prepare_sqlite(twin)
        event.listen(engine.sync_engine, "engine_disposed", lambda _engine: twin.dispose())
    return twin


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Opens a read transaction on one state of the database; does not wait for writers.

    Raises:
        Unavailable: the database cannot be reached.
    """
    with _reached(engine.url):
        async with engine.connect() as connection:
            if engine not in _writing:
                await connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            async with connection.begin():
                yield connection


async def erase_log(engine: AsyncEngine) -> bool:
    """Empties SQLite's write-ahead log, which still has what was deleted; waits for readers.

    PostgreSQL keeps deleted rows until they are vacuumed: there it does nothing.

    Returns:
        Whether it is empty. False: a reader needed it for too long; try again later.

    Raises:
        Unavailable: the database cannot be reached, or is busy for too long.
    """
    lock = _writing.get(engine)
    if lock is None:
        return True
    with _reached(engine.url):
        async with lock, engine.connect() as connection:
            # The driver's connection: SQLAlchemy would begin a transaction.
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None  # noqa: S101  # the connection is open
            cursor = await driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            is_busy, *_ = await cursor.fetchone()
            await cursor.close()
    return not is_busy


@contextmanager
def _reached(url: URL) -> Iterator[None]:
    try:
        yield
    except PoolTimeoutError as error:
        raise _unavailable(url) from error
    except DBAPIError as error:
        if is_outage(error):
            raise _unavailable(url) from error
        raise


def is_outage(error: DBAPIError) -> bool:
    """Returns whether the database is down or busy, so that a retry may succeed."""
    if error.connection_invalidated:
        return True
    if not isinstance(error, (OperationalError, InterfaceError)):
        return False
    if isinstance(error.orig, sqlite3.Error):
        # SQLite reports a missing table as an operational error, too.
        name = getattr(error.orig, "sqlite_errorname", "")
        return str(name).startswith(_SQLITE_OUTAGES)
    return True


def _unavailable(url: URL) -> Unavailable:
    return Unavailable(
        "the database does not answer",
        reason="DEPENDENCY_UNAVAILABLE",
        metadata={"dependency": url.get_backend_name()},
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )


def _on_sqlite_connect(dbapi_connection: Any, _record: Any) -> None:
    # The driver must not start transactions, since it would start deferred ones.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    for pragma in (
        f"busy_timeout = {SQLITE_BUSY_TIMEOUT_MILLIS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = ON",
        f"cache_size = -{SQLITE_CACHE_KIB}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
