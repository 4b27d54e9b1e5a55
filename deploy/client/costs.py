"""Reads and creates prices, and sums up usage, as an operator."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc

from deploy.client.edge import EdgeClient
from deploy.errors import CliError

CALL_TIMEOUT_SECONDS = 20.0
PAGE_SIZE = 1000
PER_MILLION = 1_000_000
ALL_TENANTS = "tenants/-"
NANO_USD_DIGITS = 9
MAX_ID_LENGTH = 63

_AMOUNT = re.compile(rf"[0-9]{{1,7}}(?:\.[0-9]{{1,{NANO_USD_DIGITS}}})?")
_NO_ID = re.compile(r"[^a-z0-9-]+")

DIMENSIONS: Mapping[str, cost_pb2.UsageDimension.ValueType] = {
    name.removeprefix("USAGE_DIMENSION_").lower(): value
    for name, value in cost_pb2.UsageDimension.items()
    if value != cost_pb2.USAGE_DIMENSION_UNSPECIFIED
}
BUCKETS: Mapping[str, cost_pb2.TimeBucket.ValueType] = {
    name.removeprefix("TIME_BUCKET_").lower(): value
    for name, value in cost_pb2.TimeBucket.items()
    if value != cost_pb2.TIME_BUCKET_UNSPECIFIED
}


@dataclass(frozen=True, kw_only=True)
class UsageReport:
    """All rows of a query, and their totals."""

    rows: Sequence[cost_pb2.UsageRow]
    totals: cost_pb2.UsageTotals


class CostClient:
    """Calls the cost service.

    Creating prices needs the scope `billing`; reading what belongs to all tenants `read billing`.

    Raises:
        grpc.RpcError: a call failed, from any method.
    """

    def __init__(self, edge: EdgeClient) -> None:
        self._metadata = edge.metadata
        self._stub = cost_pb2_grpc.CostServiceStub(edge.channel)

    def prices(self, *, model: str = "", tenant: str = "") -> list[cost_pb2.Price]:
        """Returns the prices of all models and tenants, or of one of them, the newest first."""
        conditions = {"model": model, "tenant": tenant and f"tenants/{tenant}"}
        request = cost_pb2.ListPricesRequest(page_size=PAGE_SIZE, filter=_filter(conditions))
        prices: list[cost_pb2.Price] = []
        while True:
            page = self._stub.ListPrices(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
            )
            prices += page.prices
            if not page.next_page_token:
                return prices
            request.page_token = page.next_page_token

    def create_price(self, price: cost_pb2.Price) -> cost_pb2.Price:
        """Creates a price and returns it."""
        answer = self._stub.CreatePrice(
            cost_pb2.CreatePriceRequest(price=price),
            metadata=self._metadata,
            timeout=CALL_TIMEOUT_SECONDS,
        )
        return answer.price

    def usage(
        self,
        *,
        tenant: str = "",
        group_by: Sequence[str],
        bucket: str = "",
        start_time: datetime | None = None,
        end_time: datetime | None = None,
    ) -> UsageReport:
        """Sums up the usage of a tenant, or of all.

        Args:
            tenant: the tenant; empty: all.
            group_by: keys of `DIMENSIONS`.
            bucket: a key of `BUCKETS`; empty: all time in one.
            start_time: usage at or after it; with a time zone.
            end_time: usage before it; with a time zone.
        """
        request = cost_pb2.QueryUsageRequest(
            tenant=f"tenants/{tenant}" if tenant else ALL_TENANTS,
            group_by=[DIMENSIONS[name] for name in group_by],
            time_bucket=BUCKETS[bucket] if bucket else cost_pb2.TIME_BUCKET_UNSPECIFIED,
            start_time=_timestamp(start_time),
            end_time=_timestamp(end_time),
            page_size=PAGE_SIZE,
        )
        rows: list[cost_pb2.UsageRow] = []
        while True:
            page = self._stub.QueryUsage(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
            )
            rows += page.rows
            if not page.next_page_token:
                return UsageReport(rows=rows, totals=page.totals)
            request.page_token = page.next_page_token


def token_price(
    model: str,
    *,
    prompt: str,
    cached_prompt: str,
    completion: str,
    tenant: str = "",
    name: str = "",
    now: datetime,
) -> cost_pb2.Price:
    """Returns a price of three amounts in US dollars per million tokens.

    Args:
        model: the public name.
        prompt: of prompt tokens that are not cached, such as `0.15`.
        cached_prompt: of cached prompt tokens.
        completion: of generated tokens.
        tenant: the only tenant that pays it; empty: all.
        name: the id of the price; empty: made of model, tenant and `now`.
        now: the time.

    Raises:
        CliError: an amount is not a decimal number of whole nano-dollars.
    """
    amounts = {
        usage_pb2.USAGE_KIND_PROMPT_TOKENS: prompt,
        usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS: cached_prompt,
        usage_pb2.USAGE_KIND_COMPLETION_TOKENS: completion,
    }
    return cost_pb2.Price(
        name=f"prices/{name or _price_id(model, tenant, now)}",
        model=model,
        tenant=f"tenants/{tenant}" if tenant else "",
        rates=[
            cost_pb2.Rate(kind=kind, nano_usd=parse_usd(amount), per_quantity=PER_MILLION)
            for kind, amount in amounts.items()
        ],
    )


def parse_usd(text: str) -> int:
    """Returns the nano-dollars of an amount in US dollars, exactly.

    Raises:
        CliError: it is not a decimal number, too large, or not a multiple of one nano-dollar.
    """
    if not _AMOUNT.fullmatch(text):
        raise CliError(
            f"{text!r} must be an amount in US dollars such as 0.15, with at most "
            f"{NANO_USD_DIGITS} decimal places"
        )
    return int(Decimal(text).scaleb(NANO_USD_DIGITS))


def usd(nano_usd: Decimal | int) -> str:
    """Returns an amount in US dollars, with at least two decimal places and no rounding."""
    text = f"{Decimal(nano_usd).scaleb(-NANO_USD_DIGITS):f}"
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"


def usd_per_million(price: cost_pb2.Price) -> Mapping[str, str]:
    """Returns the amount for each kind of usage with a rate, by the kind's name in lower case."""
    return {
        usage_pb2.UsageKind.Name(rate.kind).removeprefix("USAGE_KIND_").lower(): usd(
            Decimal(rate.nano_usd) * PER_MILLION / (rate.per_quantity or PER_MILLION)
        )
        for rate in price.rates
        if rate.kind in usage_pb2.UsageKind.values()
    }


def _filter(conditions: Mapping[str, str]) -> str:
    return " AND ".join(_conditions(conditions))


def _conditions(conditions: Mapping[str, str]) -> Iterator[str]:
    for field, value in conditions.items():
        if value:
            quoted = value.replace("\\", "\\\\").replace('"', '\\"')
            yield f'{field} = "{quoted}"'


def _price_id(model: str, tenant: str, now: datetime) -> str:
    words = [model, tenant, now.strftime("%Y%m%d-%H%M%S")]
    made = "-".join(_NO_ID.sub("-", word.lower()) for word in words if word)
    return made[-MAX_ID_LENGTH:]


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
