"""Converts rows to records and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import semver
import sqlalchemy as sa

from services.registry.domain import (
    Backend,
    Deployment,
    Kind,
    Lineage,
    ModelVersion,
    ProviderTarget,
    Schema,
    State,
    TritonBackend,
    TritonTarget,
    precedence_key,
)


def backend_of(row: sa.Row[Any]) -> TritonBackend:
    """Reads a row of `backends`."""
    return Backend(
        id=row.id,
        state=State(row.state),
        target=TritonTarget(row.address, row.backend_model),
        artifact_digest=row.artifact_digest,
        message=row.message,
        update_time=row.update_time,
    )


def backend_row(backend: TritonBackend, *, deployment: str) -> dict[str, Any]:
    """Returns the row of `backends` for a report."""
    return {
        "deployment": deployment,
        "id": backend.id,
        "address": backend.target.address,
        "backend_model": backend.target.model,
        "state": backend.state.value,
        "artifact_digest": backend.artifact_digest,
        "message": backend.message,
        "update_time": backend.update_time,
    }


def deployment_row(deployment: Deployment) -> dict[str, Any]:
    """Returns the row of `deployments`."""
    return {
        "id": deployment.id,
        "model": deployment.model_version.model,
        "version": str(deployment.model_version.version),
        "pool": deployment.pool,
        "create_time": deployment.create_time,
        "update_time": deployment.update_time,
        "spec_revision": deployment.spec_revision,
    }


def deployment_of(row: sa.Row[Any], reported: list[TritonBackend]) -> Deployment:
    """Reads a row of `deployments`, joined with `model_versions`."""
    return Deployment(
        id=row.id,
        model_version=version_of(row),
        pool=row.pool,
        create_time=row.deployment_create_time,
        update_time=row.update_time,
        spec_revision=row.spec_revision,
        reported=tuple(reported),
    )


def version_row(version: ModelVersion) -> dict[str, Any]:
    """Returns the row of `model_versions`."""
    provider = version.provider
    return {
        **asdict(version.schema),
        **asdict(version.lineage),
        "kind": version.schema.kind.value,
        "model": version.model,
        "version": str(version.version),
        "precedence": precedence_key(version.version),
        "artifact_digest": version.artifact_digest,
        "create_time": version.create_time,
        "provider_base_url": provider and provider.base_url,
        "provider_model": provider and provider.model,
        "provider_api_key_name": provider and provider.api_key_name,
    }


def version_of(row: sa.Row[Any]) -> ModelVersion:
    """Reads a row that has the columns of `model_versions`."""
    return ModelVersion(
        model=row.model,
        version=semver.Version.parse(row.version),
        artifact_digest=row.artifact_digest,
        schema=Schema(
            kind=Kind(row.kind),
            context_tokens=row.context_tokens,
            max_output_tokens=row.max_output_tokens,
            dimensions=row.dimensions,
            max_input_tokens=row.max_input_tokens,
            max_concurrent_requests=row.max_concurrent_requests,
        ),
        lineage=Lineage(
            training_run=row.training_run,
            dataset=row.dataset,
            source_revision=row.source_revision,
        ),
        create_time=row.create_time,
        provider=_provider(row),
    )


def _provider(row: sa.Row[Any]) -> ProviderTarget | None:
    if row.provider_base_url is None:
        return None
    return ProviderTarget(row.provider_base_url, row.provider_model, row.provider_api_key_name)
