"""How many requests a backend of a version processes concurrently."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the limit; existing versions have the default one."""
    column = sa.Column("max_concurrent_requests", sa.Integer, nullable=False, server_default="0")
    op.add_column("model_versions", column)
