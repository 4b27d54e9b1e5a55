"""Errors as `google.rpc.Status`, the time when a job is deleted, and an index for lists."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from alembic import op
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from libs.db import UtcDateTime

revision = "0002"
down_revision = "0001"

_DOMAIN = "headrace"
_BATCH_ROWS = 1000

_jobs = sa.table(
    "jobs",
    sa.column("job_id", sa.Text),
    sa.column("failure_code", sa.Text),
    sa.column("failure_reason", sa.Text),
    sa.column("failure_message", sa.Text),
    sa.column("error", sa.LargeBinary),
)


class _Failure(NamedTuple):
    code: str
    reason: str
    message: str


def upgrade() -> None:
    """Changes the columns and converts the errors of jobs that failed.

    `expire_time` depends on a setting: the service fills it in for jobs that ended before.
    """
    op.add_column("jobs", sa.Column("error", sa.LargeBinary))
    op.add_column("jobs", sa.Column("expire_time", UtcDateTime))
    _convert_failures()
    for name in ("failure_code", "failure_reason", "failure_message"):
        op.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
    op.create_index("jobs_of_tenant", "jobs", ["tenant", "create_time", "job_id", "state"])
    op.create_index("jobs_by_expire_time", "jobs", ["expire_time"])


def _convert_failures() -> None:
    connection = op.get_bind()
    last = ""
    while True:
        rows = connection.execute(
            sa.select(
                _jobs.c.job_id,
                _jobs.c.failure_code,
                _jobs.c.failure_reason,
                _jobs.c.failure_message,
            )
            .where(_jobs.c.failure_code.is_not(None), _jobs.c.job_id > last)
            .order_by(_jobs.c.job_id)
            .limit(_BATCH_ROWS)
        ).all()
        if not rows:
            return
        for job_id, *failure in rows:
            connection.execute(
                sa.update(_jobs)
                .where(_jobs.c.job_id == job_id)
                .values(error=_status(_Failure(*failure)))
            )
        last = rows[-1].job_id


def _status(failure: _Failure) -> bytes:
    known = failure.code in code_pb2.Code.keys()  # noqa: SIM118  # not a dict
    info = error_details_pb2.ErrorInfo(reason=failure.reason, domain=_DOMAIN)
    details = any_pb2.Any()
    details.Pack(info)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(failure.code if known else "UNKNOWN"),
        message=failure.message,
        details=[details],
    )
    return bytes(status.SerializeToString())
