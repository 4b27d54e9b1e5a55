"""Versions that an external provider runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the provider to versions; existing ones have none."""
    for name in ("provider_base_url", "provider_model", "provider_api_key_name"):
        op.add_column("model_versions", sa.Column(name, sa.Text))
