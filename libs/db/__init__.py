"""Databases: SQLite on one machine, PostgreSQL on many, with the same code for both.

Others use the names that are exported here; the modules are internal.
"""

from __future__ import annotations

from libs.db.engine import (
    create_engine,
    erase_log,
    snapshot,
    transaction,
    transaction_in_thread,
)
from libs.db.migrations import migrate
from libs.db.types import UtcDateTime

__all__ = [
    "UtcDateTime",
    "create_engine",
    "erase_log",
    "migrate",
    "snapshot",
    "transaction",
    "transaction_in_thread",
]
