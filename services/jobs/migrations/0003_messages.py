"""Where the messages of jobs are in the stream, so that they can be erased."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Creates the table; for jobs that were published before, the number is unknown."""
    op.create_table(
        "messages",
        sa.Column(
            "job_id", sa.Text, sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    )
