"""`headrace model tune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json, layout

if TYPE_CHECKING:  # `headrace token` must not import them
    from rich.console import Console
    from rich.table import Table

    from deploy.triton.tune.report import Report
    from deploy.triton.tune.search import Point, Trial
    from deploy.triton.tune.settings import Settings

Vary = Annotated[
    list[str] | None,
    typer.Option(
        help="Values to try, such as threads=1,2. May be repeated.",
        show_default="the usual settings of the model's kind",
    ),
]

app = typer.Typer(help="Manage models.", no_args_is_help=True)


@app.command()
def tune(  # noqa: PLR0917  # typer makes options of them
    model: Annotated[str, typer.Argument(help="A bundled model: minilm or smollm2.")],
    seconds: Annotated[
        float, typer.Option(help="The length of each measurement.", min=0.2, max=60)
    ] = 3.0,
    concurrency: Annotated[
        str, typer.Option(help="Numbers of clients, separated by commas.")
    ] = "1,4,16",
    p95_ms: Annotated[
        float | None,
        typer.Option(help="The longest allowed p95, of an answer or a first token.", min=0.1),
    ] = None,
    vary: Vary = None,
    limit_seconds: Annotated[
        float, typer.Option(help="Start no new candidate after this time.")
    ] = 600.0,
    write: Annotated[
        Path | None, typer.Option(help="Write the next version, with the best settings, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure settings of a model on this machine and choose the best."""
    from rich.console import Console

    from deploy.triton.tune.session import Options, parse_concurrency
    from deploy.triton.tune.session import tune as run
    from deploy.triton.tune.settings import parse_axes

    options = Options(
        seconds=seconds,
        concurrency=parse_concurrency(concurrency),
        axes=parse_axes(vary or []),
        p95_ms=p95_ms,
        limit_seconds=limit_seconds,
        write=write,
    )
    console = Console(stderr=as_json)  # with --json, stdout is for the result only
    report = run(layout().home, model, options, _ConsoleProgress(console))
    if as_json:
        _print_json(report)
    else:
        console.print(_table(report))
    _print_conclusion(console, report, write)
    if report.result.chosen is None:
        raise typer.Exit(1)


class _ConsoleProgress:
    """Prints each measurement in one line."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def point(self, kind: str, settings: Settings, point: Point) -> None:
        from deploy.triton.tune.report import describe, unit

        p95 = "-" if point.p95_ms is None else f"{point.p95_ms:.0f} ms"
        self._console.print(
            f"[dim]{describe(settings)}  clients={point.concurrency}: "
            f"{point.throughput_per_second:.1f} {unit(kind)}/s, p95 {p95}[/]",
            highlight=False,
            soft_wrap=True,
        )

    def failed(self, settings: Settings, message: str) -> None:
        from deploy.triton.tune.report import describe

        self._console.print(f"{describe(settings)}: {message}", highlight=False, markup=False)


def _print_json(report: Report) -> None:
    from deploy.triton.tune.report import as_json

    print(json.dumps(as_json(report), indent=2))


def _table(report: Report) -> Table:
    """Returns a row for each point. The chosen one is highlighted."""
    from rich.table import Table

    from deploy.triton.tune.report import latency_name, unit

    result = report.result
    limit = "" if report.p95_ms is None else f", p95 at most {report.p95_ms:g} ms"
    table = Table(title=f"latency: to the {latency_name(report.kind)}{limit}")
    for name in result.trials[0].settings:
        table.add_column(name, overflow="fold")
    for name in ("clients", f"{unit(report.kind)}/s", "p50 ms", "p95 ms", "errors", "CPU ms each"):
        table.add_column(name, justify="right", overflow="fold")
    for number, trial in enumerate(result.trials):
        best = trial.best(report.p95_ms) if trial is result.chosen else None
        for cells, point in _rows(trial):
            highlighted = point is not None and point is best
            table.add_row(*cells, style="bold green" if highlighted else None)
        if number + 1 < len(result.trials):
            table.add_section()
    return table


def _rows(trial: Trial) -> Sequence[tuple[list[str], Point | None]]:
    names = [value or "none" for value in trial.settings.values()]
    rows: list[tuple[list[str], Point | None]] = []
    for number, point in enumerate(trial.points):
        cells = [
            *([""] * len(names) if number else names),
            str(point.concurrency),
            f"{point.throughput_per_second:.1f}",
            _ms(point.p50_ms),
            _ms(point.p95_ms),
            str(point.errors),
            f"{point.cpu_ms_per_unit:.2f}",
        ]
        rows.append((cells, point))
    if trial.failure:
        rows.append(([*names, "-", "failed"], None))
    return rows


def _ms(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_conclusion(console: Console, report: Report, write: Path | None) -> None:
    from deploy.triton.tune.cpu import QUIET_CORES
    from deploy.triton.tune.report import describe

    result = report.result
    points = [point for trial in result.trials for point in trial.points]
    if not result.complete:
        console.print("the time ran out before all values were tried; see --limit-seconds")
    others = max((point.neighbours_cores for point in points), default=0.0)
    if others > QUIET_CORES:
        console.print(
            f"[yellow]other programs used up to {others:.1f} cores: measure again on a quiet "
            "machine before you rely on this[/]",
            highlight=False,
        )
    if any(point.p95_ms is None for point in points):
        console.print("some measurements were too short for one request; see --seconds")
    if result.chosen is None:
        console.print(f"no settings have a p95 of {report.p95_ms} ms or less without errors")
    else:
        label = "the current settings are the best" if result.chosen is result.now else "chosen"
        console.print(f"{label}: [b]{describe(result.chosen.settings)}[/]", highlight=False)
    plot = "" if report.plot.exists() else " (no plot: matplotlib is not installed)"
    console.print(f"results are in {report.folder}{plot}", highlight=False, soft_wrap=True)
    if write and result.chosen:
        console.print(f"the folder of the next version: {write}", highlight=False, soft_wrap=True)
