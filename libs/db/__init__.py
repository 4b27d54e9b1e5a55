"""Records: SQLite out of the box, PostgreSQL on many machines, the same code for both."""

from __future__ import annotations

from libs.db.engine import create_engine, snapshot, transaction, transaction_in_thread
from libs.db.migrations import migrate
from libs.db.types import UtcDateTime

__all__ = [
    "UtcDateTime",
    "create_engine",
    "migrate",
    "snapshot",
    "transaction",
    "transaction_in_thread",
]
