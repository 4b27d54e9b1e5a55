"""Rows to what the domain knows, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import semver
import sqlalchemy as sa

from services.registry.domain import (
    Backend,
    Kind,
    Lineage,
    ModelVersion,
    Provider,
    Schema,
    State,
    precedence_key,
)


def backend_of(row: sa.Row[Any]) -> Backend:
    """Reads a row of `backends`."""
    return Backend(
        id=row.id,
        address=row.address,
        backend_model=row.backend_model,
        state=State(row.state),
        artifact_digest=row.artifact_digest,
        message=row.message,
    )


def backend_row(backend: Backend, *, deployment: str) -> dict[str, Any]:
    """Returns the row of `backends` that keeps a report; only those of Triton are kept."""
    return {
        "deployment": deployment,
        "id": backend.id,
        "address": backend.address,
        "backend_model": backend.backend_model,
        "state": backend.state.value,
        "artifact_digest": backend.artifact_digest,
        "message": backend.message,
    }


def version_row(version: ModelVersion) -> dict[str, Any]:
    """Returns the row of `model_versions` that keeps a version."""
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


def _provider(row: sa.Row[Any]) -> Provider | None:
    if row.provider_base_url is None:
        return None
    return Provider(row.provider_base_url, row.provider_model, row.provider_api_key_name)
