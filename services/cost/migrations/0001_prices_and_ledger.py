"""The price book and the ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from libs.db import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "prices",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("input_nano_usd_per_million_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_input_nano_usd_per_million_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_nano_usd_per_million_tokens", sa.BigInteger, nullable=False),
        sa.Column("effective_time", UtcDateTime),
        sa.Column("create_time", UtcDateTime, nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("usage_id", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("model_version", sa.Text, nullable=False),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("price", sa.Text, nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("event_time", UtcDateTime, nullable=False),
        sa.Column("book_time", UtcDateTime, nullable=False),
    )
    op.create_index("usage_of_request", "usage", ["tenant", "request_id"])
    op.create_index("usage_of_tenant", "usage", ["tenant", "event_time"])
    op.create_table(
        "postings",
        sa.Column("usage_id", sa.Text, sa.ForeignKey("usage.usage_id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("quantity_tokens", sa.BigInteger, nullable=False),
        sa.Column("price", sa.Text, nullable=False),
        sa.Column("nano_usd_per_million_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
    )
