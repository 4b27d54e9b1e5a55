"""The price book and the ledger, in SQL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import import_module
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import snapshot, transaction, transaction_in_thread
from libs.errors import InvalidArgument
from libs.rpc.paging import Page, PageRequest
from services.cost.domain import Posting, Price, Usage, UsageFilter, UsageSum
from services.cost.tables import postings, prices, usage

# Sums are added up in two parts, since a database's own sum of 64-bit numbers may overflow.
_SPLIT = 1_000_000_000


_INSERT_POSTINGS = sa.insert(postings)
_Lot = tuple[Usage, Sequence[Posting]]


class _BookedBeforeError(Exception):
    """Some of a lot is in the ledger already."""


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """What the ledger has of one request, oldest usage first."""

    tenant: str
    user: str
    model_version: str
    postings: Sequence[Posting]


class CostStore:
    """The only SQL of the service. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # Both have ON CONFLICT, alike and under two types. Imported is the one that is used.
        dialect = import_module(f"sqlalchemy.dialects.{engine.dialect.name}")
        self._insert: Any = dialect.insert
        self._insert_new_usage = self._insert(usage).on_conflict_do_nothing()

    async def insert_price(self, price: Price) -> Price:
        """Adds a price, unless its name is taken. Returns the one that has the name now."""
        insert = self._insert(prices).values(**asdict(price)).on_conflict_do_nothing()
        async with transaction(self._engine) as connection:
            await connection.execute(insert)
            by_name = sa.select(prices).where(prices.c.name == price.name)
            row = (await connection.execute(by_name)).one()
        return _price(row)

    async def all_prices(self) -> list[Price]:
        """Returns the whole book, in no order."""
        async with snapshot(self._engine) as connection:
            return [_price(row) for row in await connection.execute(sa.select(prices))]

    async def list_prices(self, model: str, page: PageRequest) -> Page[Price]:
        """Returns a page of prices, newest first; of all models if `model` is empty."""
        holds_from = sa.func.coalesce(prices.c.effective_time, prices.c.create_time)
        query = sa.select(prices).order_by(holds_from.desc(), prices.c.name.desc())
        if model:
            query = query.where(prices.c.model == model)
        if page.after:
            moment, name = _age_key(page.after)
            query = query.where(
                sa.or_(
                    holds_from < moment,
                    sa.and_(holds_from == moment, prices.c.name < name),
                )
            )
        async with snapshot(self._engine) as connection:
            rows = [_price(row) for row in await connection.execute(query.limit(page.limit))]
        return Page.of(rows, page, key=lambda price: f"{price.holds_from.isoformat()} {price.name}")

    async def book(self, bookings: Sequence[_Lot], book_time: datetime) -> set[str]:
        """Writes usage and its postings, all or nothing; what the ledger has already, it skips.

        Returns:
            The ids of the usage that was new. A replica that books the same at the same time
            waits for this transaction and then finds it.
        """
        by_id = {used.usage_id: (used, lot) for used, lot in reversed(bookings)}
        # One order everywhere: replicas that book the same lot wait, and do not lock each other.
        lots = [by_id[usage_id] for usage_id in sorted(by_id)]
        rows = [{**vars(used), "book_time": book_time} for used, _ in lots]

        def book_all_new(connection: sa.Connection) -> set[str]:
            # Cheaper than to ask for the ids of the new: mostly all are.
            told = connection.execute(
                self._insert_new_usage, rows, execution_options={"preserve_rowcount": True}
            )
            if told.rowcount != len(rows):
                raise _BookedBeforeError
            _insert_postings(connection, lots)
            return set(by_id)

        def book_new(connection: sa.Connection) -> set[str]:
            insert = self._insert_new_usage.returning(usage.c.usage_id)
            booked = set(connection.execute(insert, rows).scalars())
            _insert_postings(connection, [lot for lot in lots if lot[0].usage_id in booked])
            return booked

        try:
            return await transaction_in_thread(self._engine, book_all_new)
        except _BookedBeforeError:  # all is undone
            return await transaction_in_thread(self._engine, book_new)

    async def request_cost(self, tenant: str, request_id: str) -> RequestCost | None:
        """Returns what is booked for a request of a tenant, or None if nothing is."""
        query = (
            sa.select(usage.c.user, usage.c.model_version, postings)
            .join_from(usage, postings, isouter=True)
            .where(usage.c.tenant == tenant, usage.c.request_id == request_id)
            .order_by(usage.c.event_time, usage.c.usage_id, postings.c.position)
        )
        async with snapshot(self._engine) as connection:
            rows = (await connection.execute(query)).all()
        if not rows:
            return None
        return RequestCost(
            tenant=tenant,
            user=rows[0].user,
            model_version=rows[0].model_version,
            # A usage of no tokens has no lines.
            postings=[_posting(row) for row in rows if row.usage_id is not None],
        )

    async def sum_usage(self, wanted: UsageFilter, *, limit: int) -> list[UsageSum]:
        """Returns at most `limit` sums, ordered by tenant, user and model."""
        owner = (usage.c.tenant, usage.c.user, usage.c.model)
        query = (
            sa.select(
                *owner,
                sa.func.count(usage.c.request_id.distinct()).label("request_count"),
                sa.func.sum(usage.c.prompt_tokens).label("prompt_tokens"),
                sa.func.sum(usage.c.completion_tokens).label("completion_tokens"),
                sa.func.sum(usage.c.cached_tokens).label("cached_tokens"),
                sa.func.sum(usage.c.cost_nano_usd // _SPLIT).label("cost_high"),
                sa.func.sum(usage.c.cost_nano_usd % _SPLIT).label("cost_low"),
            )
            .where(*_conditions(wanted))
            .group_by(*owner)
            .order_by(*owner)
            .limit(limit)
        )
        async with snapshot(self._engine) as connection:
            return [_usage_sum(row) for row in await connection.execute(query)]


def _insert_postings(connection: sa.Connection, lots: Iterable[_Lot]) -> None:
    rows = [
        {**vars(line), "position": position}
        for _, lines in lots
        for position, line in enumerate(lines)
    ]
    if rows:
        connection.execute(_INSERT_POSTINGS, rows)


def _conditions(wanted: UsageFilter) -> list[sa.ColumnElement[bool]]:
    conditions = [usage.c.tenant == wanted.tenant]
    if wanted.user is not None:
        conditions.append(usage.c.user == wanted.user)
    if wanted.model is not None:
        conditions.append(usage.c.model == wanted.model)
    if wanted.start_time is not None:
        conditions.append(usage.c.event_time >= wanted.start_time)
    if wanted.end_time is not None:
        conditions.append(usage.c.event_time < wanted.end_time)
    return conditions


def _age_key(after: str) -> tuple[datetime, str]:
    moment, _, name = after.partition(" ")
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise InvalidArgument.of_field("page_token", "is not from an answer of ours")
    return parsed, name


def _price(row: sa.Row[Any]) -> Price:
    return Price(**row._mapping)  # noqa: SLF001  # public, whatever its name


def _posting(row: sa.Row[Any]) -> Posting:
    return Posting(
        usage_id=row.usage_id,
        kind=row.kind,
        quantity_tokens=row.quantity_tokens,
        price=row.price,
        nano_usd_per_million_tokens=row.nano_usd_per_million_tokens,
        cost_nano_usd=row.cost_nano_usd,
    )


def _usage_sum(row: sa.Row[Any]) -> UsageSum:
    return UsageSum(
        tenant=row.tenant,
        user=row.user,
        model=row.model,
        request_count=row.request_count,
        prompt_tokens=int(row.prompt_tokens),
        completion_tokens=int(row.completion_tokens),
        cached_tokens=int(row.cached_tokens),
        cost_nano_usd=int(row.cost_high) * _SPLIT + int(row.cost_low),
    )
