"""The records of the registry, in SQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import semver
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from libs.db import snapshot, transaction
from libs.errors import AlreadyExists, NotFound
from libs.model_reference import version_name
from libs.rpc.names import resource_name
from libs.rpc.paging import Page, PageRequest
from services.registry.domain import (
    Deployment,
    Model,
    ModelVersion,
    Snapshot,
    SpecChange,
    TritonBackend,
    precedence_key,
)
from services.registry.filters import Condition
from services.registry.rows import (
    backend_of,
    backend_row,
    deployment_of,
    deployment_row,
    version_of,
    version_row,
)
from services.registry.rules import check_etag, check_report, check_same_model, missing_version
from services.registry.tables import (
    backends,
    deployments,
    deployments_revision,
    model_versions,
    models,
)

_SELECT_DEPLOYMENTS = (
    sa.select(
        deployments.c.id,
        deployments.c.pool,
        deployments.c.create_time.label("deployment_create_time"),
        deployments.c.update_time,
        deployments.c.spec_revision,
        *model_versions.c,
    )
    .select_from(deployments.join(model_versions))
    .order_by(deployments.c.id)
)


class RegistryStore:
    """Reads and writes the records. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def insert_model(self, model: Model) -> None:
        """Adds a model.

        Raises:
            AlreadyExists: the name is taken.
        """
        with _unique_name(model.name):
            async with transaction(self._engine) as connection:
                await connection.execute(sa.insert(models).values(**asdict(model)))

    async def get_model(self, identifier: str) -> Model:
        """Returns a model.

        Raises:
            NotFound: it does not exist.
        """
        async with snapshot(self._engine) as connection:
            return await _model(connection, identifier)

    async def list_models(
        self, page: PageRequest, conditions: Sequence[Condition] = ()
    ) -> Page[Model]:
        """Returns the models by name."""
        found = (
            sa.select(models)
            .where(models.c.id > page.after, *conditions)
            .order_by(models.c.id)
            .limit(page.limit)
        )
        async with snapshot(self._engine) as connection:
            rows = [Model(**row._asdict()) for row in await connection.execute(found)]
        return Page.of(rows, page, key=lambda model: model.id)

    async def insert_version(self, version: ModelVersion) -> None:
        """Adds a version.

        Raises:
            NotFound: the model does not exist.
            AlreadyExists: the name is taken.
        """
        with _unique_name(version.name):
            async with transaction(self._engine) as connection:
                await _model(connection, version.model)
                await connection.execute(sa.insert(model_versions).values(**version_row(version)))

    async def find_version(self, model: str, version: semver.Version) -> ModelVersion | None:
        """Returns a version; None if it does not exist."""
        async with snapshot(self._engine) as connection:
            return await _version(connection, model, version)

    async def list_versions(
        self, model: str, page: PageRequest, conditions: Sequence[Condition] = ()
    ) -> Page[ModelVersion]:
        """Returns the versions of a model, the highest first.

        Raises:
            NotFound: the model does not exist.
        """
        found = sa.select(model_versions).where(model_versions.c.model == model, *conditions)
        if page.after:
            found = found.where(model_versions.c.precedence < page.after)
        found = found.order_by(model_versions.c.precedence.desc()).limit(page.limit)
        async with snapshot(self._engine) as connection:
            await _model(connection, model)
            rows = [version_of(row) for row in await connection.execute(found)]
        return Page.of(rows, page, key=lambda one: precedence_key(one.version))

    async def insert_deployment(self, deployment: Deployment) -> Deployment:
        """Adds a deployment of an existing version, and returns it with its revision.

        Raises:
            AlreadyExists: the name is taken.
        """
        with _unique_name(deployment.name):
            async with transaction(self._engine) as connection:
                added = replace(deployment, spec_revision=await _next_revision(connection))
                await connection.execute(sa.insert(deployments).values(**deployment_row(added)))
                return added

    async def get_deployment(self, identifier: str) -> Deployment:
        """Returns a deployment.

        Raises:
            NotFound: it does not exist.
        """
        async with snapshot(self._engine) as connection:
            return await _deployment(connection, identifier)

    async def list_deployments(
        self, page: PageRequest, conditions: Sequence[Condition] = ()
    ) -> Page[Deployment]:
        """Returns the deployments by name."""
        found = _SELECT_DEPLOYMENTS.where(deployments.c.id > page.after, *conditions)
        async with snapshot(self._engine) as connection:
            result = await connection.execute(found.limit(page.limit))
            rows = await _with_backends(connection, result.all())
        return Page.of(rows, page, key=lambda deployment: deployment.id)

    async def update_deployment(
        self, identifier: str, change: SpecChange, *, etag: str, now: datetime
    ) -> tuple[Deployment, bool]:
        """Changes a spec, and forgets the reports about the one before.

        Returns the deployment, and whether its spec is another one now.

        Raises:
            NotFound: the deployment does not exist.
            Aborted: it has another etag.
            InvalidArgument: the version is of another model.
            FailedPrecondition: the version does not exist.
        """
        async with transaction(self._engine) as connection:
            await _lock(connection)
            known = await _deployment(connection, identifier)
            check_etag(known, etag)
            version, pool = known.model_version, known.pool
            if change.version is not None:
                version = await _new_version(connection, known, *change.version)
            if change.pool is not None:
                pool = change.pool
            if (version, pool) == (known.model_version, known.pool):
                return known, False
            changed = replace(
                known,
                model_version=version,
                pool=pool,
                update_time=now,
                spec_revision=await _next_revision(connection),
                reported=(),
            )
            this = deployments.c.id == identifier
            await connection.execute(
                sa.update(deployments).where(this).values(**deployment_row(changed))
            )
            await connection.execute(sa.delete(backends).where(backends.c.deployment == identifier))
            return changed, True

    async def delete_deployment(self, identifier: str, *, etag: str) -> None:
        """Deletes a deployment and the reports of its backends.

        Raises:
            NotFound: it does not exist.
            Aborted: it has another etag.
        """
        async with transaction(self._engine) as connection:
            await _lock(connection)
            check_etag(await _deployment(connection, identifier), etag)
            await _next_revision(connection)
            await connection.execute(sa.delete(deployments).where(deployments.c.id == identifier))

    async def put_backend(self, identifier: str, backend: TritonBackend) -> bool:
        """Stores the report of a backend. Returns whether anything but its time is new.

        Raises:
            NotFound: the deployment does not exist.
            InvalidArgument, FailedPrecondition: see `check_report`.
        """
        async with transaction(self._engine) as connection:
            await _lock(connection)
            deployment = await _deployment(connection, identifier)
            check_report(backend, deployment)
            is_new = backend not in deployment.reported
            if is_new:
                await _next_revision(connection)
            key = {"deployment": identifier, "id": backend.id}
            await connection.execute(sa.delete(backends).filter_by(**key))
            await connection.execute(
                sa.insert(backends).values(**backend_row(backend, deployment=identifier))
            )
            return is_new

    async def revision(self) -> int:
        """Returns the revision of the deployments."""
        async with snapshot(self._engine) as connection:
            return await _revision(connection)

    async def deployments_snapshot(self) -> Snapshot:
        """Returns all deployments as they are at one revision."""
        async with snapshot(self._engine) as connection:
            revision = await _revision(connection)
            rows = (await connection.execute(_SELECT_DEPLOYMENTS)).all()
            return Snapshot(revision, tuple(await _with_backends(connection, rows)))


async def _lock(connection: AsyncConnection) -> None:
    """Keeps other writers of deployments out until the transaction ends."""
    revision = deployments_revision.c.revision
    await connection.execute(sa.update(deployments_revision).values(revision=revision))


async def _next_revision(connection: AsyncConnection) -> int:
    revision = deployments_revision.c.revision
    await connection.execute(sa.update(deployments_revision).values(revision=revision + 1))
    return await _revision(connection)


async def _revision(connection: AsyncConnection) -> int:
    found = await connection.execute(sa.select(deployments_revision.c.revision))
    return int(found.scalar_one())


async def _model(connection: AsyncConnection, identifier: str) -> Model:
    found = await connection.execute(sa.select(models).where(models.c.id == identifier))
    row = found.one_or_none()
    if row is None:
        raise NotFound.of_resource(resource_name("models", identifier))
    return Model(**row._asdict())


async def _version(
    connection: AsyncConnection, model: str, version: semver.Version
) -> ModelVersion | None:
    found = sa.select(model_versions).where(
        model_versions.c.model == model, model_versions.c.version == str(version)
    )
    row = (await connection.execute(found)).one_or_none()
    return None if row is None else version_of(row)


async def _new_version(
    connection: AsyncConnection, deployment: Deployment, model: str, version: semver.Version
) -> ModelVersion:
    check_same_model(deployment, model)
    found = await _version(connection, model, version)
    if found is None:
        raise missing_version(version_name(model, str(version)))
    return found


async def _deployment(connection: AsyncConnection, identifier: str) -> Deployment:
    found = await connection.execute(_SELECT_DEPLOYMENTS.where(deployments.c.id == identifier))
    rows = await _with_backends(connection, found.all())
    if not rows:
        raise NotFound.of_resource(resource_name("deployments", identifier))
    return rows[0]


async def _with_backends(
    connection: AsyncConnection, rows: Sequence[sa.Row[Any]]
) -> list[Deployment]:
    reported = defaultdict(list)
    if rows:
        # A range, not a list of ids: databases limit the length of such lists. No BETWEEN: the
        # collation that SQLAlchemy renders into it is an error on PostgreSQL.
        found = await connection.execute(
            sa.select(backends)
            .where(backends.c.deployment >= rows[0].id, backends.c.deployment <= rows[-1].id)
            .order_by(backends.c.id)
        )
        for row in found:
            reported[row.deployment].append(backend_of(row))
    return [deployment_of(row, reported[row.id]) for row in rows]


@contextmanager
def _unique_name(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise AlreadyExists.of_resource(name) from error
