"""Prices and the ledger, in SQL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from itertools import groupby
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import snapshot, transaction, transaction_in_thread
from libs.metering.pricing import Rate, UsageKind
from libs.rpc.paging import Page, PageRequest, invalid_page_token
from services.cost.domain import Posting, PostingKind, Price, Usage
from services.cost.tables import postings, prices, rates, usage

_INSERT_POSTINGS = sa.insert(postings)
_Booking: TypeAlias = tuple[Usage, Sequence[Posting]]


class _BookedBeforeError(Exception):
    """Some of the usage is in the ledger already."""


@dataclass(frozen=True, kw_only=True)
class PriceFilter:
    """Which prices to list.

    Attributes:
        model: of this model; None: of all.
        tenant: for this tenant only; empty: general prices; None: both.
        visible_to: those that apply to this tenant: its own and general ones; None: all.
    """

    model: str | None = None
    tenant: str | None = None
    visible_to: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """What the ledger has of one request, the oldest usage first."""

    tenant: str
    user: str
    model_version: str
    postings: Sequence[Posting]


class CostStore:
    """Reads and writes prices, usage and postings. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # Both dialects have the same ON CONFLICT, in two types. Only the one in use is imported.
        dialect = import_module(f"sqlalchemy.dialects.{engine.dialect.name}")
        self._insert: Any = dialect.insert
        self._insert_new_usage = self._insert(usage).on_conflict_do_nothing()

    async def insert_price(self, price: Price) -> Price:
        """Adds a price, unless its name is taken. Returns the one that has the name now."""
        row = {column.name: getattr(price, column.name) for column in prices.columns}
        insert = self._insert(prices).values(row).on_conflict_do_nothing().returning(prices.c.name)
        async with transaction(self._engine) as connection:
            if (await connection.execute(insert)).first():
                await connection.execute(sa.insert(rates), _rate_rows(price))
            by_name = _priced(prices).where(prices.c.name == price.name)
            (stored,) = _prices(await connection.execute(by_name))
        return stored

    async def all_prices(self) -> list[Price]:
        """Returns every price."""
        async with snapshot(self._engine) as connection:
            return _prices(await connection.execute(_priced(prices).order_by(prices.c.name)))

    async def list_prices(self, wanted: PriceFilter, page: PageRequest) -> Page[Price]:
        """Returns a page of prices, the newest first.

        Raises:
            InvalidArgument: the page token is invalid.
        """
        effective_from = sa.func.coalesce(prices.c.effective_time, prices.c.create_time)
        conditions = _price_conditions(wanted)
        if page.after:
            moment, name = _age_key(page.after)
            earlier = sa.and_(effective_from == moment, prices.c.name < name)
            conditions.append(sa.or_(effective_from < moment, earlier))
        newest = (
            sa.select(prices, effective_from.label("effective_from"))
            .where(*conditions)
            .order_by(sa.desc("effective_from"), prices.c.name.desc())
            .limit(page.limit)
            .subquery()
        )
        query = _priced(newest).order_by(newest.c.effective_from.desc(), newest.c.name.desc())
        async with snapshot(self._engine) as connection:
            found = _prices(await connection.execute(query))
        return Page.of(
            found, page, key=lambda price: f"{price.effective_from.isoformat()} {price.name}"
        )

    async def book(self, bookings: Sequence[_Booking], book_time: datetime) -> set[str]:
        """Writes usage and its postings, all or nothing, without what the ledger has already.

        Returns:
            The ids of the new usage. A replica that books the same at the same time waits for
            this transaction and then finds it.
        """
        by_id = {used.usage_id: (used, lines) for used, lines in reversed(bookings)}
        # The same order everywhere: replicas that book the same usage do not lock each other out.
        ordered = [by_id[usage_id] for usage_id in sorted(by_id)]
        rows = [{**vars(used), "book_time": book_time} for used, _ in ordered]

        def book_all_new(connection: sa.Connection) -> set[str]:
            # Cheaper than returning the ids of the new usage: nearly always all of it is new.
            result = connection.execute(
                self._insert_new_usage, rows, execution_options={"preserve_rowcount": True}
            )
            if result.rowcount != len(rows):
                raise _BookedBeforeError
            _insert_postings(connection, ordered)
            return set(by_id)

        def book_new(connection: sa.Connection) -> set[str]:
            insert = self._insert_new_usage.returning(usage.c.usage_id)
            booked = set(connection.execute(insert, rows).scalars())
            _insert_postings(connection, [each for each in ordered if each[0].usage_id in booked])
            return booked

        try:
            return await transaction_in_thread(self._engine, book_all_new)
        except _BookedBeforeError:  # it is rolled back
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
            # A usage of no tokens has no postings.
            postings=[_posting(row) for row in rows if row.usage_id is not None],
        )


def _priced(source: sa.FromClause) -> sa.Select[Any]:
    """Selects prices from the table or a part of it, each with its rates: one row a rate."""
    names = [column.name for column in prices.columns]
    return sa.select(
        *(source.c[name] for name in names), rates.c.kind, rates.c.nano_usd, rates.c.per_quantity
    ).join_from(source, rates, source.c.name == rates.c.price)


def _prices(rows: Iterable[sa.Row[Any]]) -> list[Price]:
    """Reads what `_priced` selects; the rows of each price stand together."""
    return [_price(list(of_price)) for _, of_price in groupby(rows, key=lambda row: row.name)]


def _price(rows: Sequence[sa.Row[Any]]) -> Price:
    fields = {column.name: rows[0]._mapping[column.name] for column in prices.columns}  # noqa: SLF001  # public, whatever its name
    return Price(
        **fields,
        rates={UsageKind(row.kind): Rate(row.nano_usd, row.per_quantity) for row in rows},
    )


def _rate_rows(price: Price) -> list[dict[str, Any]]:
    return [
        {"price": price.name, "kind": kind.value, **rate._asdict()}
        for kind, rate in price.rates.items()
    ]


def _price_conditions(wanted: PriceFilter) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.model is not None:
        conditions.append(prices.c.model == wanted.model)
    if wanted.tenant is not None:
        conditions.append(prices.c.tenant == wanted.tenant)
    if wanted.visible_to is not None:
        conditions.append(prices.c.tenant.in_(["", wanted.visible_to]))
    return conditions


def _insert_postings(connection: sa.Connection, bookings: Iterable[_Booking]) -> None:
    rows = [
        {**_posting_row(line), "position": position}
        for _, lines in bookings
        for position, line in enumerate(lines)
    ]
    if rows:
        connection.execute(_INSERT_POSTINGS, rows)


def _posting_row(line: Posting) -> dict[str, Any]:
    usage_kind = line.usage_kind and line.usage_kind.value
    return {**vars(line), "kind": line.kind.value, "usage_kind": usage_kind}


def _age_key(after: str) -> tuple[datetime, str]:
    moment, _, name = after.partition(" ")
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError as error:
        raise invalid_page_token() from error
    if parsed.tzinfo is None:
        raise invalid_page_token()
    return parsed, name


def _posting(row: sa.Row[Any]) -> Posting:
    return Posting(
        usage_id=row.usage_id,
        kind=PostingKind(row.kind),
        usage_kind=None if row.usage_kind is None else UsageKind(row.usage_kind),
        quantity=row.quantity,
        price=row.price,
        rate_nano_usd=row.rate_nano_usd,
        rate_per_quantity=row.rate_per_quantity,
        cost_nano_usd=row.cost_nano_usd,
    )
