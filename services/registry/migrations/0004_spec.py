"""When the spec of a deployment last changed, and when a backend last reported."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from libs.db import UtcDateTime

revision = "0004"
down_revision = "0003"

# Only to add the column to rows that exist; SQLite cannot add one that is NOT NULL without it.
_LONG_AGO = "1970-01-01 00:00:00"


def upgrade() -> None:
    """Adds the columns. The spec of an existing deployment has not changed since its creation.

    When its backends last reported is not known: it stays NULL until they report again.
    """
    op.add_column(
        "deployments",
        sa.Column("update_time", UtcDateTime, nullable=False, server_default=_LONG_AGO),
    )
    op.execute("UPDATE deployments SET update_time = create_time")
    op.add_column(
        "deployments",
        sa.Column("spec_revision", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.add_column("backends", sa.Column("update_time", UtcDateTime))
