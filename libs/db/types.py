"""Column types that both databases keep alike."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import DateTime, Dialect, TypeDecorator
from typing_extensions import override

if TYPE_CHECKING:
    _Decorator = TypeDecorator[datetime]
else:
    _Decorator = TypeDecorator


class UtcDateTime(_Decorator):
    """A moment, given and read with its time zone, kept in UTC; sorts and compares as text too."""

    impl = DateTime(timezone=True)  # type: ignore[mutable-override]  # SQLAlchemy's own idiom
    cache_ok = True  # type: ignore[mutable-override]  # likewise

    @override
    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone says nothing")
        return value.astimezone(UTC)

    @override
    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # SQLite gives back what it was given, less the zone.
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
