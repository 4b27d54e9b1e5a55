"""Column types that behave the same in both databases."""

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
    """A time with a time zone, stored in UTC; sorts and compares as text too."""

    impl = DateTime(timezone=True)  # type: ignore[mutable-override]  # SQLAlchemy's own idiom
    cache_ok = True  # type: ignore[mutable-override]  # likewise

    @override
    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("the time has no time zone; use an aware datetime")
        return value.astimezone(UTC)

    @override
    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # SQLite returns the stored time without its zone.
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
