"""`headrace price` and `headrace cost`: options and output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from typer.testing import CliRunner

from cli import cost
from cli.__main__ import app
from deploy.client.costs import UsageReport
from deploy.errors import CliError

START = datetime(2026, 11, 1, tzinfo=UTC)


def stamp(moment: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(moment)
    return made


class FakeCosts:
    """A client of a cost service with one price and two rows of usage."""

    def __init__(self) -> None:
        self.created: list[cost_pb2.Price] = []
        self.arguments: dict[str, Any] = {}

    def prices(self, **arguments: str) -> list[cost_pb2.Price]:
        self.arguments = arguments
        rate = cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=150_000_000, per_quantity=1_000_000
        )
        return [
            cost_pb2.Price(name="prices/a", model="smollm2", rates=[rate], create_time=stamp(START))
        ]

    def create_price(self, price: cost_pb2.Price) -> cost_pb2.Price:
        self.created.append(price)
        return price

    def usage(self, **arguments: Any) -> UsageReport:
        self.arguments = arguments
        sums = [
            cost_pb2.UsageTotals(
                request_count=count,
                usage=usage_pb2.TokenUsage(
                    prompt_tokens=1000 * count, completion_tokens=2, cached_tokens=1
                ),
                cost_nano_usd=count * 10**8,
            )
            for count in (1, 2, 3)
        ]
        rows = [
            cost_pb2.UsageRow(
                bucket_start_time=stamp(START),
                tenant=f"tenants/{tenant}",
                model="smollm2",
                operation=usage_pb2.OPERATION_EMBED,
                totals=totals,
            )
            for tenant, totals in zip(("acme", "other"), sums, strict=False)
        ]
        return UsageReport(rows=rows, totals=sums[2])


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> FakeCosts:
    fake = FakeCosts()

    @contextmanager
    def client(_scopes: str) -> Iterator[FakeCosts]:
        yield fake

    monkeypatch.setattr(cost, "_cost_client", client)
    return fake


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def lines_of(text: str) -> Sequence[str]:
    """Returns the lines with one space between columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_prices_are_listed_in_a_table(costs: FakeCosts):
    """In US dollars per million tokens; kinds without a rate are free."""
    lines = lines_of(run("price", "ls", "--model", "smollm2"))

    expected = "prices/a smollm2 all 2026-11-01 00:00:00+00:00 0.15 free free"
    assert expected in lines
    assert costs.arguments == {"model": "smollm2", "tenant": ""}


def test_no_value_of_a_table_in_a_pipe_is_cut(costs: FakeCosts, monkeypatch: pytest.MonkeyPatch):
    """Programs read it, and no terminal limits its lines."""
    (price,) = costs.prices()
    price.name = f"prices/{'a' * 63}"
    monkeypatch.setattr(costs, "prices", lambda **_arguments: [price])

    result = CliRunner(env={"COLUMNS": None}).invoke(app, ["price", "ls"])

    assert f"{price.name}  smollm2  all" in result.stdout


@pytest.mark.usefixtures("costs")
def test_prices_are_listed_in_json():
    """With the amounts as decimal text, which is exact."""
    assert json.loads(run("price", "ls", "--json")) == [
        {
            "name": "prices/a",
            "model": "smollm2",
            "tenant": "",
            "effective_time": "2026-11-01 00:00:00+00:00",
            "usd_per_million": {"prompt_tokens": "0.15"},
        }
    ]


def test_a_price_is_set_for_a_tenant(costs: FakeCosts):
    """Amounts are per million tokens."""
    run("price", "set", "smollm2", "--input", "0.1", "--cached-input", "0.025",
        "--output", "0.4", "--tenant", "acme")  # fmt: skip

    (price,) = costs.created
    assert (price.model, price.tenant) == ("smollm2", "tenants/acme")
    assert [(rate.nano_usd, rate.per_quantity) for rate in price.rates] == [
        (100_000_000, 1_000_000),
        (25_000_000, 1_000_000),
        (400_000_000, 1_000_000),
    ]


def test_cached_tokens_cost_as_much_as_others_by_default(costs: FakeCosts):
    """A forgotten option does not make them free."""
    run("price", "set", "smollm2", "--input", "0.1", "--output", "0.4", "--name", "mine")

    (price,) = costs.created
    assert price.name == "prices/mine"
    assert [rate.nano_usd for rate in price.rates] == [100_000_000, 100_000_000, 400_000_000]


def test_costs_are_reported_in_a_table(costs: FakeCosts):
    """One row a group, then the totals."""
    lines = lines_of(run("cost", "report", "--by", "tenant,model", "--bucket", "day"))

    assert "2026-11-01 tenants/acme smollm2 1 1,000 1 2 0.10" in lines
    assert "total 3 3,000 1 2 0.30" in lines
    assert costs.arguments["group_by"] == ["tenant", "model"]
    assert costs.arguments["bucket"] == "day"


def test_costs_are_reported_in_json(costs: FakeCosts):
    """Numbers are whole nano-dollars and tokens."""
    body = json.loads(
        run("cost", "report", "--by", "operation", "--since", "2026-11-01", "--tenant", "acme",
            "--json")
    )  # fmt: skip

    sums = {"prompt_tokens": 1000, "cached_tokens": 1, "completion_tokens": 2}
    assert body["rows"][0] == {
        "operation": "embed", "requests": 1, **sums, "cost_nano_usd": 10**8,
    }  # fmt: skip
    assert body["totals"]["cost_nano_usd"] == 3 * 10**8
    assert (costs.arguments["tenant"], costs.arguments["start_time"]) == ("acme", START)


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "report", "--by", "tenants"], "--by tenants: use tenant, user, model"),
        (["cost", "report", "--bucket", "week"], "--bucket week: use hour, day"),
        (["cost", "report", "--since", "yesterday"], "--since yesterday: use a time such as"),
        (["price", "set", "m", "--input", "1c", "--output", "1"], "'1c' must be an amount"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_to_do(arguments: list[str], message: str):
    """In one line, without a traceback."""
    with pytest.raises(CliError, match=message):
        run(*arguments)
