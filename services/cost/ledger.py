"""Books usage: each usage id once, and many in one transaction when they queue up."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import structlog
from prometheus_client import Counter, Histogram
from sqlalchemy.exc import DataError, IntegrityError

from libs.clock import Clock
from services.cost.domain import Posting, PostingKind, Price, Usage, postings_of
from services.cost.price_book import PriceBook
from services.cost.store import CostStore

_log = structlog.get_logger()

_BOOKED = Counter("headrace_cost_usage_booked", "Usage events booked.")
_DUPLICATE = Counter("headrace_cost_usage_duplicate", "Usage events that were booked before.")
_ADJUSTED = Counter(
    "headrace_cost_usage_adjusted", "Usage events whose cost differs from what their price gives."
)
_BATCH_EVENTS = Histogram(
    "headrace_cost_booking_batch_events",
    "Usage events booked in one transaction.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)

MAX_BATCH_EVENTS = 256
# The least time between the starts of transactions: usage that comes in between shares the next.
GATHER_SECONDS = 0.050


@dataclass(eq=False)
class _Waiting:
    usage: Usage
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, error: Exception | None = None) -> None:
        if self.done.done():  # its caller was cancelled
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
            self.done.exception()  # no warning where its caller was cancelled


class Ledger:
    """Books usage events by group commit.

    An event that comes alone is booked immediately; those that come soon after a transaction
    started share the next one. The consumer's `max_in_flight` limits the length of the queue.
    """

    def __init__(self, store: CostStore, price_book: PriceBook, clock: Clock) -> None:
        self._store = store
        self._price_book = price_book
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._turn = asyncio.Lock()
        self._next_seconds = 0.0

    async def book(self, *usages: Usage) -> None:
        """Returns when all of it is in the ledger, by this call or an earlier one.

        Raises:
            InvalidUsageError: some can never be booked; then none is.
            Unavailable: the database does not answer. The usage may be booked nevertheless.
        """
        for usage in usages:
            usage.check()
        mine = [_Waiting(usage) for usage in usages]
        self._waiting.extend(mine)
        async with self._turn:
            # The first caller books for those behind it, which then find their usage booked. One
            # that is cancelled leaves its batch in the queue for the next.
            while not all(each.done.done() for each in mine):
                await self._book_next_batch()
        for each in mine:
            await each.done

    async def _book_next_batch(self) -> None:
        wait_seconds = self._next_seconds - self._clock.monotonic_seconds()
        if wait_seconds > 0 and len(self._waiting) < MAX_BATCH_EVENTS:
            await self._clock.sleep(wait_seconds)
        self._next_seconds = self._clock.monotonic_seconds() + GATHER_SECONDS
        batch = [self._waiting[i] for i in range(min(len(self._waiting), MAX_BATCH_EVENTS))]
        try:
            await self._book(batch)
        except (DataError, IntegrityError) as error:
            if len(batch) == 1:
                batch[0].settle(error)
            else:
                await self._book_one_by_one(batch)
        except Exception as error:  # noqa: BLE001  # raised by each call of `book`
            for waiting in batch:
                waiting.settle(error)
        for _ in batch:
            self._waiting.popleft()

    async def _book_one_by_one(self, batch: list[_Waiting]) -> None:
        """Books the others of a batch in which the database refuses one."""
        for waiting in batch:
            try:
                await self._book([waiting])
            except Exception as error:  # noqa: BLE001  # raised by its call of `book`
                waiting.settle(error)

    async def _book(self, batch: list[_Waiting]) -> None:
        bookings = []
        for waiting in batch:
            price = await self._price_book.find(waiting.usage.price)
            bookings.append((waiting.usage, postings_of(waiting.usage, price), price))
        booked = await self._store.book(
            [(usage, lines) for usage, lines, _ in bookings], self._clock.now()
        )
        _BATCH_EVENTS.observe(len(batch))
        for usage, lines, price in bookings:
            if usage.usage_id not in booked:
                _DUPLICATE.inc()
                continue
            booked.discard(usage.usage_id)
            _BOOKED.inc()
            _report_adjustment(usage, lines, price)
        for waiting in batch:
            waiting.settle()


def _report_adjustment(usage: Usage, lines: tuple[Posting, ...], price: Price | None) -> None:
    if lines and lines[-1].kind is PostingKind.ADJUSTMENT:
        _ADJUSTED.inc()
        _log.error(
            "the client was given another cost than its price gives",
            usage_id=usage.usage_id,
            tenant=usage.tenant,
            model_version=usage.model_version,
            price=usage.price,
            price_known=price is not None,
            reported_nano_usd=usage.cost_nano_usd,
            adjustment_nano_usd=lines[-1].cost_nano_usd,
        )
