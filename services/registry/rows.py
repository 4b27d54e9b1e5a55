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


def version_row(version: ModelVersion) -> dict[str, Any]:
    """Returns the row of `model_versions` that keeps a version."""
    return {
        **asdict(version.schema),
        **asdict(version.lineage),
        "kind": version.schema.kind.value,
        "model": version.model,
        "version": str(version.version),
        "precedence": precedence_key(version.version),
        "artifact_digest": version.artifact_digest,
        "create_time": version.create_time,
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
        ),
        lineage=Lineage(
            training_run=row.training_run,
            dataset=row.dataset,
            source_revision=row.source_revision,
        ),
        create_time=row.create_time,
    )
