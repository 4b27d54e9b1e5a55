"""The tables, as the last migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

from libs.db import UtcDateTime

metadata = sa.MetaData()

prices = sa.Table(
    "prices",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    # Empty: for all tenants that have no price of their own.
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("effective_time", UtcDateTime),
    sa.Column("create_time", UtcDateTime, nullable=False),
)

rates = sa.Table(
    "rates",
    metadata,
    sa.Column("price", sa.Text, sa.ForeignKey("prices.name"), primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("nano_usd", sa.BigInteger, nullable=False),
    sa.Column("per_quantity", sa.BigInteger, nullable=False),
)

usage = sa.Table(
    "usage",
    metadata,
    # Unique: each usage event is booked once.
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
    sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
    sa.Column("price", sa.Text, nullable=False),
    sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
    sa.Column("event_time", UtcDateTime, nullable=False),
    sa.Column("book_time", UtcDateTime, nullable=False),
    sa.Index("usage_of_request", "tenant", "request_id"),
    sa.Index("usage_of_tenant", "tenant", "event_time"),
)

postings = sa.Table(
    "postings",
    metadata,
    sa.Column("usage_id", sa.Text, sa.ForeignKey("usage.usage_id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    # NULL: an adjustment.
    sa.Column("usage_kind", sa.Text),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("price", sa.Text, nullable=False),
    sa.Column("rate_nano_usd", sa.BigInteger, nullable=False),
    sa.Column("rate_per_quantity", sa.BigInteger, nullable=False),
    sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
)
