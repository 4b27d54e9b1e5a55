"""The registry's records, in SQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import semver
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from libs.db import snapshot, transaction
from libs.errors import AlreadyExists, NotFound
from libs.rpc.names import resource_name
from libs.rpc.paging import Page, PageRequest
from services.registry.domain import (
    Backend,
    Deployment,
    Model,
    ModelVersion,
    Snapshot,
    check_report,
    precedence_key,
)
from services.registry.rows import backend_of, backend_row, version_of, version_row
from services.registry.tables import (
    backends,
    deployments,
    deployments_revision,
    model_versions,
    models,
)

_DEPLOYED = deployments.join(model_versions)
_DEPLOYMENT_COLUMNS = (
    deployments.c.id,
    deployments.c.pool,
    deployments.c.create_time.label("deployment_create_time"),
    *model_versions.c,
)


class RegistryStore:
    """The only SQL of the service. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def insert_model(self, model: Model) -> None:
        """Keeps a new model.

        Raises:
            AlreadyExists: there is one of that name.
        """
        with _name_taken(model.name):
            async with transaction(self._engine) as connection:
                await connection.execute(sa.insert(models).values(**asdict(model)))

    async def get_model(self, identifier: str) -> Model:
        """Returns a model.

        Raises:
            NotFound: there is none of that name.
        """
        async with snapshot(self._engine) as connection:
            return await _model(connection, identifier)

    async def list_models(self, page: PageRequest) -> Page[Model]:
        """Returns the models by name."""
        found = (
            sa.select(models)
            .where(models.c.id > page.after)
            .order_by(models.c.id)
            .limit(page.limit)
        )
        async with snapshot(self._engine) as connection:
            rows = [Model(**row._asdict()) for row in await connection.execute(found)]
        return Page.of(rows, page, key=lambda model: model.id)

    async def insert_version(self, version: ModelVersion) -> None:
        """Keeps a new version.

        Raises:
            NotFound: there is no such model.
            AlreadyExists: there is one of that name.
        """
        with _name_taken(version.name):
            async with transaction(self._engine) as connection:
                await _model(connection, version.model)
                await connection.execute(sa.insert(model_versions).values(**version_row(version)))

    async def find_version(self, model: str, version: semver.Version) -> ModelVersion | None:
        """Returns a version, if there is one of that name."""
        found = sa.select(model_versions).where(
            model_versions.c.model == model, model_versions.c.version == str(version)
        )
        async with snapshot(self._engine) as connection:
            row = (await connection.execute(found)).one_or_none()
        return None if row is None else version_of(row)

    async def list_versions(self, model: str, page: PageRequest) -> Page[ModelVersion]:
        """Returns the versions of a model, the highest first.

        Raises:
            NotFound: there is no such model.
        """
        found = sa.select(model_versions).where(model_versions.c.model == model)
        if page.after:
            found = found.where(model_versions.c.precedence < page.after)
        found = found.order_by(model_versions.c.precedence.desc()).limit(page.limit)
        async with snapshot(self._engine) as connection:
            await _model(connection, model)
            rows = [version_of(row) for row in await connection.execute(found)]
        return Page.of(rows, page, key=lambda one: precedence_key(one.version))

    async def insert_deployment(self, deployment: Deployment) -> None:
        """Keeps a new deployment of a version that exists.

        Raises:
            AlreadyExists: there is one of that name.
        """
        version = deployment.model_version
        with _name_taken(deployment.name):
            async with transaction(self._engine) as connection:
                await _next_revision(connection)
                await connection.execute(
                    sa.insert(deployments).values(
                        id=deployment.id,
                        model=version.model,
                        version=str(version.version),
                        pool=deployment.pool,
                        create_time=deployment.create_time,
                    )
                )

    async def get_deployment(self, identifier: str) -> Deployment:
        """Returns a deployment.

        Raises:
            NotFound: there is none of that name.
        """
        async with snapshot(self._engine) as connection:
            return await _deployment(connection, identifier)

    async def list_deployments(self, page: PageRequest) -> Page[Deployment]:
        """Returns the deployments by name."""
        found = (
            sa.select(*_DEPLOYMENT_COLUMNS)
            .select_from(_DEPLOYED)
            .where(deployments.c.id > page.after)
            .order_by(deployments.c.id)
            .limit(page.limit)
        )
        async with snapshot(self._engine) as connection:
            rows = await _with_backends(connection, (await connection.execute(found)).all())
        return Page.of(rows, page, key=lambda deployment: deployment.id)

    async def delete_deployment(self, identifier: str) -> None:
        """Forgets a deployment, and what its backends reported.

        Raises:
            NotFound: there is none of that name.
        """
        async with transaction(self._engine) as connection:
            await _next_revision(connection)
            deleted = await connection.execute(
                sa.delete(deployments).where(deployments.c.id == identifier)
            )
            if deleted.rowcount == 0:
                raise NotFound.of_resource(resource_name("deployments", identifier))

    async def put_backend(self, identifier: str, backend: Backend) -> bool:
        """Keeps what a backend reports of a deployment. Returns whether that was news.

        Raises:
            NotFound: there is no such deployment.
            FailedPrecondition: the backend is ready with another artifact.
        """
        async with transaction(self._engine) as connection:
            # First, for its lock: no other writer comes between what is read here and kept.
            await _next_revision(connection)
            deployment = await _deployment(connection, identifier)
            check_report(backend, deployment)
            if backend in deployment.reported:
                await connection.rollback()
                return False
            key = {"deployment": identifier, "id": backend.id}
            await connection.execute(sa.delete(backends).filter_by(**key))
            await connection.execute(
                sa.insert(backends).values(**backend_row(backend, deployment=identifier))
            )
            return True

    async def revision(self) -> int:
        """Returns the revision of the deployments."""
        async with snapshot(self._engine) as connection:
            return await _revision(connection)

    async def deployments_snapshot(self) -> Snapshot:
        """Returns all deployments as they are at one revision."""
        found = sa.select(*_DEPLOYMENT_COLUMNS).select_from(_DEPLOYED).order_by(deployments.c.id)
        async with snapshot(self._engine) as connection:
            revision = await _revision(connection)
            rows = (await connection.execute(found)).all()
            return Snapshot(revision, tuple(await _with_backends(connection, rows)))


async def _next_revision(connection: AsyncConnection) -> None:
    revision = deployments_revision.c.revision
    await connection.execute(sa.update(deployments_revision).values(revision=revision + 1))


async def _revision(connection: AsyncConnection) -> int:
    found = await connection.execute(sa.select(deployments_revision.c.revision))
    return int(found.scalar_one())


async def _model(connection: AsyncConnection, identifier: str) -> Model:
    found = await connection.execute(sa.select(models).where(models.c.id == identifier))
    row = found.one_or_none()
    if row is None:
        raise NotFound.of_resource(resource_name("models", identifier))
    return Model(**row._asdict())


async def _deployment(connection: AsyncConnection, identifier: str) -> Deployment:
    found = await connection.execute(
        sa.select(*_DEPLOYMENT_COLUMNS).select_from(_DEPLOYED).where(deployments.c.id == identifier)
    )
    rows = await _with_backends(connection, found.all())
    if not rows:
        raise NotFound.of_resource(resource_name("deployments", identifier))
    return rows[0]


async def _with_backends(
    connection: AsyncConnection, rows: Sequence[sa.Row[Any]]
) -> list[Deployment]:
    reported = defaultdict(list)
    if rows:
        # A range, not a list of ids: of those a database takes only so many. No BETWEEN: the
        # collation that SQLAlchemy renders into it is an error on PostgreSQL.
        found = await connection.execute(
            sa.select(backends)
            .where(backends.c.deployment >= rows[0].id, backends.c.deployment <= rows[-1].id)
            .order_by(backends.c.id)
        )
        for row in found:
            reported[row.deployment].append(backend_of(row))
    return [
        Deployment(
            id=row.id,
            model_version=version_of(row),
            pool=row.pool,
            create_time=row.deployment_create_time,
            reported=tuple(reported[row.id]),
        )
        for row in rows
    ]


@contextmanager
def _name_taken(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise AlreadyExists.of_resource(name) from error
