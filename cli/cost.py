"""`headrace price ls`, `headrace price set` and `headrace cost report`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_TENANT, DEFAULT_USER, Json, console, layout
from deploy.errors import CliError

if TYPE_CHECKING:  # `headrace token` must not import them
    from headrace.cost.v1 import cost_pb2
    from rich.table import Table

    from deploy.client.costs import CostClient, UsageReport

_KINDS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens")
_PER_MILLION = "US dollars per million"

prices = typer.Typer(help="Show and set prices of models.", no_args_is_help=True)
costs = typer.Typer(help="Show what the requests of all tenants cost.", no_args_is_help=True)


@prices.command("ls")
def list_prices(
    model: Annotated[str, typer.Option(help="Only prices of this model.")] = "",
    tenant: Annotated[str, typer.Option(help="Only prices of this tenant.")] = "",
    as_json: Json = False,
) -> None:
    """List prices, the newest first."""
    with _cost_client("read billing") as client:
        found = client.prices(model=model, tenant=tenant)
    _print_prices(found, as_json=as_json)


@prices.command("set")
def set_price(  # noqa: PLR0917  # typer makes options of them
    model: Annotated[str, typer.Argument(help="The model's name.")],
    prompt: Annotated[str, typer.Option("--input", help=f"{_PER_MILLION} prompt tokens.")],
    completion: Annotated[str, typer.Option("--output", help=f"{_PER_MILLION} generated tokens.")],
    cached_prompt: Annotated[
        str | None,
        typer.Option(
            "--cached-input",
            help=f"{_PER_MILLION} cached prompt tokens.",
            show_default="the same as --input",
        ),
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="The tenant that pays this price.", show_default="all tenants")
    ] = "",
    name: Annotated[
        str, typer.Option(help="The id of the price.", show_default="model, tenant and time")
    ] = "",
    as_json: Json = False,
) -> None:
    """Set the price of a model from now on. Costs of earlier requests stay as they are."""
    from deploy.client.costs import token_price

    price = token_price(
        model,
        prompt=prompt,
        cached_prompt=prompt if cached_prompt is None else cached_prompt,
        completion=completion,
        tenant=tenant,
        name=name,
        now=datetime.now(UTC),
    )
    with _cost_client("billing") as client:
        created = client.create_price(price)
    _print_prices([created], as_json=as_json)


@costs.command("report")
def report(  # noqa: PLR0917  # typer makes options of them
    by: Annotated[
        str,
        typer.Option(
            help="One row for each combination of: tenant, user, model, model_version, operation."
        ),
    ] = "tenant,model",
    bucket: Annotated[
        str, typer.Option(help="Also one row for each hour or day, in UTC.", show_default="none")
    ] = "",
    tenant: Annotated[str, typer.Option(help="Only this tenant.", show_default="all")] = "",
    since: Annotated[
        str, typer.Option(help="Usage from this time on, such as 2026-11-01, in UTC.")
    ] = "",
    until: Annotated[str, typer.Option(help="Usage before this time, in UTC.")] = "",
    as_json: Json = False,
) -> None:
    """Sum up tokens and costs from the ledger."""
    from deploy.client.costs import BUCKETS, DIMENSIONS

    group_by = _words("--by", by, DIMENSIONS)
    if bucket:
        _words("--bucket", bucket, BUCKETS)
    start_time, end_time = _moment("--since", since), _moment("--until", until)
    with _cost_client("read billing") as client:
        found = client.usage(
            tenant=tenant,
            group_by=group_by,
            bucket=bucket,
            start_time=start_time,
            end_time=end_time,
        )
    if as_json:
        rows = [_group(row, group_by, bucket) | _sums(row.totals) for row in found.rows]
        print(json.dumps({"rows": rows, "totals": _sums(found.totals)}, indent=2))
    else:
        console().print(_report_table(found, group_by, bucket))


@contextmanager
def _cost_client(scopes: str) -> Iterator[CostClient]:
    """Connects with some scopes. A failed call is an error that the user can fix."""
    import grpc

    from deploy.client.costs import CostClient
    from deploy.client.edge import describe
    from deploy.local.edge import connect

    edge = connect(layout(), tenant=DEFAULT_TENANT, user=DEFAULT_USER, scopes=scopes)
    with edge:
        try:
            yield CostClient(edge)
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error


def _words(option: str, text: str, known: Mapping[str, Any]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            raise CliError(f"{option} {word}: use {', '.join(known)}")
    return words


def _moment(option: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise CliError(f"{option} {text}: use a time such as 2026-11-01T12:00") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _print_prices(found: Sequence[cost_pb2.Price], *, as_json: bool) -> None:
    from deploy.client.costs import usd_per_million

    rows = [
        {
            "name": price.name,
            "model": price.model,
            "tenant": price.tenant,
            "effective_time": _effective_time(price),
            "usd_per_million": dict(usd_per_million(price)),
        }
        for price in found
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console().print(_price_table(rows))


def _price_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("price", "model", "tenant", "from", box=None, caption="USD per million tokens")
    for column in ("input", "cached input", "output"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            row["model"],
            row["tenant"] or "all",
            row["effective_time"],
            *(row["usd_per_million"].get(kind, "free") for kind in _KINDS),
        )
    return table


def _effective_time(price: cost_pb2.Price) -> str:
    stamp = price.effective_time if price.HasField("effective_time") else price.create_time
    return stamp.ToDatetime(tzinfo=UTC).isoformat(" ", "seconds")


def _group(row: cost_pb2.UsageRow, group_by: Sequence[str], bucket: str) -> dict[str, str]:
    from headrace.common.v1 import usage_pb2

    group: dict[str, str] = {}
    if bucket:
        start = row.bucket_start_time.ToDatetime(tzinfo=UTC)
        group[bucket] = f"{start:%Y-%m-%d}" if bucket == "day" else f"{start:%Y-%m-%dT%H:%MZ}"
    for name in group_by:
        if name == "operation":
            known = row.operation in usage_pb2.Operation.values()
            group[name] = (
                (usage_pb2.Operation.Name(row.operation) if known else str(row.operation))
                .removeprefix("OPERATION_")
                .lower()
            )
        else:
            group[name] = getattr(row, name)
    return group


def _sums(totals: cost_pb2.UsageTotals) -> dict[str, int]:
    return {
        "requests": totals.request_count,
        "prompt_tokens": totals.usage.prompt_tokens,
        "cached_tokens": totals.usage.cached_tokens,
        "completion_tokens": totals.usage.completion_tokens,
        "cost_nano_usd": totals.cost_nano_usd,
    }


def _report_table(found: UsageReport, group_by: Sequence[str], bucket: str) -> Table:
    from rich.table import Table

    from deploy.client.costs import usd

    names = [*([bucket] if bucket else []), *group_by]
    table = Table(*(name.replace("_", " ") for name in names), box=None, show_footer=True)
    table.columns[0].footer = "total"
    for key, total in _sums(found.totals).items():
        money = key == "cost_nano_usd"
        table.add_column(
            "USD" if money else key.replace("_", " "),
            justify="right",
            footer=usd(total) if money else f"{total:,}",
        )
    for row in found.rows:
        sums = _sums(row.totals)
        cost = usd(sums.pop("cost_nano_usd"))
        group = _group(row, group_by, bucket)
        table.add_row(*group.values(), *(f"{count:,}" for count in sums.values()), cost)
    return table
