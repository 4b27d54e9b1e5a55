"""The tables, as the newest migration leaves them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import UtcDateTime

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("attempt_count", sa.Integer, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("result", sa.LargeBinary),
    # A serialised google.rpc.Status.
    sa.Column("error", sa.LargeBinary),
    # Null: the job has not ended, or an earlier version ended it and it is not filled in yet.
    sa.Column("expire_time", UtcDateTime),
    sa.Index("jobs_of_state", "state"),
    sa.Index("jobs_of_tenant", "tenant", "create_time", "job_id", "state"),
    sa.Index("jobs_by_expire_time", "expire_time"),
)

# One row for each job that has not ended.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.job_id"), primary_key=True),
    # W3C: the worker continues the trace in which the job was submitted.
    sa.Column("traceparent", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("publish_count", sa.Integer, nullable=False),
    # Null: to be published.
    sa.Column("publish_time", UtcDateTime),
    sa.Index("outbox_by_time", "publish_time", "create_time"),
)

# Where the last message of a job is or was in the stream. It is erased with the job.
messages = sa.Table(
    "messages",
    metadata,
    sa.Column(
        "job_id", sa.Text, sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)


def upsert_of(engine: AsyncEngine) -> Any:
    """Returns the `insert` that has ON CONFLICT, which SQLAlchemy has once for each dialect."""
    # Only the one in use is imported.
    return import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert
