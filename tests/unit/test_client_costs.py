"""Prices and costs as operators read and set them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime
from decimal import Decimal

import grpc
import pytest
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from deploy.client.costs import CostClient, parse_usd, token_price, usd, usd_per_million
from deploy.client.edge import EdgeClient
from deploy.errors import CliError

NOW = datetime(2026, 11, 27, 17, 5, 1, tzinfo=UTC)


class PagedCosts(cost_pb2_grpc.CostServiceServicer):
    """Answers every list in two pages, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[cost_pb2.ListPricesRequest | cost_pb2.QueryUsageRequest] = []

    def ListPrices(self, request, context):
        self.requests.append(request)
        number = "2" if request.page_token else "1"
        return cost_pb2.ListPricesResponse(
            prices=[cost_pb2.Price(name=f"prices/{number}")],
            next_page_token="" if request.page_token else "next",
        )

    def QueryUsage(self, request, context):
        self.requests.append(request)
        return cost_pb2.QueryUsageResponse(
            rows=[cost_pb2.UsageRow(user="2" if request.page_token else "1")],
            next_page_token="" if request.page_token else "next",
            totals=cost_pb2.UsageTotals(request_count=7),
        )


@pytest.fixture
def service() -> PagedCosts:
    return PagedCosts()  # type: ignore[abstract]  # the other RPCs are not called


@pytest.fixture
def client(service: PagedCosts) -> Iterator[CostClient]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    cost_pb2_grpc.add_CostServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with EdgeClient(f"127.0.0.1:{port}", token="token") as edge:  # noqa: S106  # of a test
        yield CostClient(edge)
    server.stop(None).wait()


def test_prices_of_all_pages_are_returned(client: CostClient, service: PagedCosts):
    """With the filter on every page, its values quoted."""
    found = client.prices(model='a"b\\', tenant="acme")

    assert [price.name for price in found] == ["prices/1", "prices/2"]
    expected = 'model = "a\\"b\\\\" AND tenant = "tenants/acme"'
    assert [request.filter for request in service.requests] == [expected, expected]


def test_without_conditions_there_is_no_filter(client: CostClient, service: PagedCosts):
    """General prices and those of all tenants."""
    client.prices()

    assert service.requests[0].filter == ""


def test_usage_of_all_pages_is_returned(client: CostClient, service: PagedCosts):
    """By default of all tenants."""
    found = client.usage(group_by=["user", "model_version"], bucket="day", start_time=NOW)

    assert [row.user for row in found.rows] == ["1", "2"]
    assert found.totals.request_count == 7
    first = service.requests[0]
    assert isinstance(first, cost_pb2.QueryUsageRequest)
    assert first.tenant == "tenants/-"
    assert list(first.group_by) == [
        cost_pb2.USAGE_DIMENSION_USER,
        cost_pb2.USAGE_DIMENSION_MODEL_VERSION,
    ]
    assert first.time_bucket == cost_pb2.TIME_BUCKET_DAY
    assert first.start_time.ToDatetime(tzinfo=UTC) == NOW
    assert not first.HasField("end_time")


@given(st.integers(0, 10**15))
def test_an_amount_is_printed_and_parsed_exactly(nano_usd: int):
    """Through decimal numbers, never through floats."""
    assert parse_usd(usd(nano_usd)) == nano_usd


@pytest.mark.parametrize(
    ("text", "nano_usd"),
    [("0", 0), ("0.10", 100_000_000), ("15", 15 * 10**9), ("0.000000001", 1), ("1.1", 11 * 10**8)],
)
def test_an_amount_is_in_dollars(text: str, nano_usd: int):
    """With up to nine decimal places."""
    assert parse_usd(text) == nano_usd


@pytest.mark.parametrize(
    "text", ["", "-1", "$1", "1e3", "1,5", ".5", "1.", "0.0000000001", "nan", "12345678", "٣"]
)
def test_a_wrong_amount_is_refused(text: str):
    """Also one that is not a multiple of one nano-dollar."""
    with pytest.raises(CliError, match="must be an amount in US dollars"):
        parse_usd(text)


def test_a_price_of_tokens_has_three_rates():
    """Each per million tokens; its id says for what and when it was set."""
    price = token_price(
        "Smol.LM2",
        prompt="0.1",
        cached_prompt="0.025",
        completion="0.4",
        tenant="acme",
        now=NOW,
    )

    assert price.name == "prices/smol-lm2-acme-20261127-170501"
    assert (price.model, price.tenant) == ("Smol.LM2", "tenants/acme")
    assert {rate.per_quantity for rate in price.rates} == {1_000_000}
    assert usd_per_million(price) == {
        "prompt_tokens": "0.10",
        "cached_prompt_tokens": "0.025",
        "completion_tokens": "0.40",
    }


def test_a_long_name_keeps_its_end():
    """The time makes it unique; ids have at most 63 characters."""
    price = token_price("m" * 100, prompt="1", cached_prompt="1", completion="1", now=NOW)

    assert len(price.name) == len("prices/") + 63
    assert price.name.endswith("-20261127-170501")


def test_rates_of_any_quantity_are_shown_per_million():
    """Exactly, as far as decimal numbers can."""
    rate = cost_pb2.Rate(kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=3, per_quantity=8)

    assert usd_per_million(cost_pb2.Price(rates=[rate])) == {"prompt_tokens": "0.000375"}
    assert usd(Decimal("0.5")) == "0.0000000005"
