"""The tables, as the newest migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

from libs.db import UtcDateTime

# Sorted byte by byte, as SQLite does; PostgreSQL would ask the machine's language.
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
    # All three, or none.
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
)

# One row: the revision of the deployments and their backends.
deployments_revision = sa.Table(
    "deployments_revision",
    metadata,
    sa.Column("revision", sa.BigInteger, nullable=False),
)
