"""Models, versions, deployments and the reports of their backends."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from libs.db import UtcDateTime

revision = "0001"
down_revision = None

_Sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Creates the tables and the first revision of the deployments."""
    op.create_table(
        "models",
        sa.Column("id", _Sorted, primary_key=True),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
    )
    op.create_table(
        "model_versions",
        sa.Column("model", _Sorted, sa.ForeignKey("models.id"), primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
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
    )
    op.create_index(
        "model_versions_by_precedence", "model_versions", ["model", "precedence"], unique=True
    )
    op.create_table(
        "deployments",
        sa.Column("id", _Sorted, primary_key=True),
        sa.Column("model", _Sorted, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["model_versions.model", "model_versions.version"]
        ),
    )
    op.create_table(
        "backends",
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
    revision_table = op.create_table(
        "deployments_revision",
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(revision_table, [{"revision": 0}])
