"""Databases of older registries."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from libs.db import create_engine, migrate, transaction
from services.registry.domain import Backend, State, TritonTarget
from services.registry.store import RegistryStore
from services.registry.tables import backends, deployments, metadata, model_versions, models
from tests.support.registry_fixtures import database_url, module_postgres  # noqa: F401  # fixtures

pytestmark = pytest.mark.integration

REVISIONS = Path(__file__).parents[2] / "services" / "registry" / "migrations"
CREATED = datetime(2026, 11, 23, 4, 5, 6, tzinfo=UTC)
NEW_COLUMNS = {"update_time", "spec_revision"}


def old_row(table: sa.Table, **values: object) -> sa.Insert:
    """Makes the statement that inserts a row without the columns of newer revisions."""
    known = [column for column in table.columns if column.name not in NEW_COLUMNS]
    filler = {column.name: 1 if column.type.python_type is int else "x" for column in known}
    row = {name: values.get(name, filler[name]) for name in filler}
    columns = [sa.column(column.name, column.type) for column in known]
    return sa.table(table.name, *columns).insert().values(**row)


async def test_deployments_of_an_older_registry_keep_everything(url, tmp_path):
    """Their spec counts as unchanged since their creation, and their backends stay."""
    folder = tmp_path / "old"
    folder.mkdir()
    for path in REVISIONS.glob("000[1-3]_*.py"):
        shutil.copy(path, folder)
    await migrate(url, "registry", folder=folder)
    engine = create_engine(url)
    async with transaction(engine) as connection:
        for statement in (
            old_row(models, id="m", create_time=CREATED),
            old_row(model_versions, model="m", version="1.0.0", kind="chat", create_time=CREATED),
            *(
                old_row(deployments, id=name, model="m", version="1.0.0", create_time=CREATED)
                for name in ("a", "b")
            ),
            old_row(backends, deployment="a", id="triton-0", state="ready"),
        ):
            await connection.execute(statement)
    await engine.dispose()

    await migrate(url, "registry")
    await migrate(url, "registry")  # the second time there is nothing to do
    engine = create_engine(url)
    snapshot = await RegistryStore(engine).deployments_snapshot()
    first, second = snapshot.deployments
    assert (first.id, first.create_time, first.update_time) == ("a", CREATED, CREATED)
    assert first.etag == second.etag != ""
    (backend,) = first.reported
    assert backend == Backend("triton-0", State.READY, TritonTarget("x", "x"), "x", "x")
    assert backend.update_time is None
    await engine.dispose()


async def test_the_tables_are_what_the_migrations_create(url):
    """The store selects by `tables.py`, so both must have the same columns."""
    await migrate(url, "registry")
    engine = create_engine(url)
    async with engine.connect() as connection:
        created = await connection.run_sync(
            lambda sync: {
                table: {
                    (column["name"], column["nullable"])
                    for column in sa.inspect(sync).get_columns(table)
                }
                for table in metadata.tables
            }
        )
    await engine.dispose()
    assert created == {
        name: {(column.name, column.nullable) for column in table.columns}
        for name, table in metadata.tables.items()
    }
