"""The tables as the newest migration defines them."""

from __future__ import annotations

import sqlalchemy as sa

from libs.db import UtcDateTime

# Sorted byte by byte, as in SQLite; PostgreSQL would use the collation of the machine.
_Sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

metadata = sa.MetaData()

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", _Sorted, primary_key=True),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
)

model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("model", _Sorted, sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("version", sa.Text, primary_key=True),
    # `domain.precedence_key` of the version.
    sa.Column("precedence", _Sorted, nullable=False),
    sa.Column("artifact_digest", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("context_tokens", sa.Integer, nullable=False),
    sa.Column("max_output_tokens", sa.Integer, nullable=False),
    sa.Column("dimensions", sa.Integer, nullable=False),
    sa.Column("max_input_tokens", sa.Integer, nullable=False),
    sa.Column("training_run", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("source_revision", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    # All three are NULL, or none is.
    sa.Column("provider_base_url", sa.Text),
    sa.Column("provider_model", sa.Text),
    sa.Column("provider_api_key_name", sa.Text),
    sa.Column("max_concurrent_requests", sa.Integer, nullable=False, server_default="0"),
    sa.Index("model_versions_by_precedence", "model", "precedence", unique=True),
)

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("id", _Sorted, primary_key=True),
    sa.Column("model", _Sorted, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    # The defaults were needed once, by the migration.
    sa.Column("update_time", UtcDateTime, nullable=False, server_default="1970-01-01 00:00:00"),
    # The revision of the deployments at which model, version or pool last changed.
    sa.Column("spec_revision", sa.BigInteger, nullable=False, server_default="0"),
    sa.ForeignKeyConstraint(
        ["model", "version"], ["model_versions.model", "model_versions.version"]
    ),
)

backends = sa.Table(
    "backends",
    metadata,
    sa.Column(
        "deployment",
        _Sorted,
        sa.ForeignKey("deployments.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("id", _Sorted, primary_key=True),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("backend_model", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("artifact_digest", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    # NULL: before this column was added.
    sa.Column("update_time", UtcDateTime),
)

# One row: the revision of the deployments and their backends.
deployments_revision = sa.Table(
    "deployments_revision",
    metadata,
    sa.Column("revision", sa.BigInteger, nullable=False),
)
