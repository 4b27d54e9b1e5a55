"""Rates by kind of usage, prices of one tenant, and postings with two kinds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# The kinds of usage, by the names that they had in prices and postings.
_USAGE_KINDS = {
    "input": "prompt_tokens",
    "cached_input": "cached_prompt_tokens",
    "output": "completion_tokens",
}
_PER_QUANTITY = 1_000_000


def upgrade() -> None:
    """Moves the rates of prices to a table of their own, and splits the kind of postings in two."""
    _move_rates()
    _split_posting_kinds()
    op.add_column(
        "usage", sa.Column("reasoning_tokens", sa.BigInteger, nullable=False, server_default="0")
    )


def _move_rates() -> None:
    op.add_column("prices", sa.Column("tenant", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "rates",
        sa.Column("price", sa.Text, sa.ForeignKey("prices.name"), primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("nano_usd", sa.BigInteger, nullable=False),
        sa.Column("per_quantity", sa.BigInteger, nullable=False),
    )
    for old, kind in _USAGE_KINDS.items():
        column = f"{old}_nano_usd_per_million_tokens"
        op.execute(
            "INSERT INTO rates (price, kind, nano_usd, per_quantity) "  # noqa: S608  # constants
            f"SELECT name, '{kind}', {column}, {_PER_QUANTITY} FROM prices"
        )
        op.execute(f"ALTER TABLE prices DROP COLUMN {column}")


def _split_posting_kinds() -> None:
    op.execute("ALTER TABLE postings RENAME COLUMN quantity_tokens TO quantity")
    op.execute("ALTER TABLE postings RENAME COLUMN nano_usd_per_million_tokens TO rate_nano_usd")
    op.add_column("postings", sa.Column("usage_kind", sa.Text))
    op.add_column(
        "postings",
        sa.Column("rate_per_quantity", sa.BigInteger, nullable=False, server_default="0"),
    )
    for old, kind in _USAGE_KINDS.items():
        op.execute(
            f"UPDATE postings SET kind = 'charge', usage_kind = '{kind}', "  # noqa: S608  # constants
            f"rate_per_quantity = {_PER_QUANTITY} WHERE kind = '{old}'"
        )
