"""Measures settings of a bundled model on this machine, and chooses.

Settings are part of a version: what is chosen becomes a new model folder, to be packed as the next
version. No running mesh is touched, but one that works at the same time takes its cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deploy.errors import CliError
from deploy.triton.artifact import ArtifactUnavailableError, bundled_names, model_files
from deploy.triton.tune.cpu import QUIET_CORES, CpuUsed
from deploy.triton.tune.load import Load, observe
from deploy.triton.tune.plot import draw
from deploy.triton.tune.report import describe, table, unit, write_json
from deploy.triton.tune.search import Point, Result, Trial, search
from deploy.triton.tune.server import TuningTriton, tuning_triton
from deploy.triton.tune.settings import Axes, Settings, configured, current, default_axes
from deploy.triton.tune.write import require_new, write_folder

MAX_CLIENTS = 256
MAX_POINTS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for.

    Attributes:
        seconds: of each window.
        axes: the values to try; empty: the usual ones of the model's kind.
        p95_ms: the bound, of a text or of a first token; None: there is none.
        limit_seconds: no new candidate begins after so long.
        write: where the chosen folder goes.
    """

    seconds: float
    concurrency: Sequence[int]
    axes: Axes
    p95_ms: float | None
    limit_seconds: float
    write: Path | None


def tune(home: Path, model: str, options: Options) -> Result:
    """Measures, shows and keeps what was found in `HEADRACE_HOME/tune/<model>`.

    Raises:
        CannotRun: what is asked cannot be done here.
    """
    if options.write:
        require_new(options.write)
    files = _files(model)
    kind = str(json.loads(files["headrace.json"].read_text())["kind"])
    config = files["config.pbtxt"].read_text()
    axes = options.axes or default_axes(kind)
    start = current(config, axes)
    for name, values in axes.items():  # what cannot be set is said before anything is measured
        for value in values:
            configured(config, {name: value})
    folder = home / "tune" / model
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    until = time.monotonic() + options.limit_seconds
    with tuning_triton(folder / "triton.log") as triton:
        trials = _Trials(
            triton, files=files, config=config, kind=kind, options=options, console=console
        )
        result = search(
            start,
            axes,
            measure=trials.measure,
            p95_ms=options.p95_ms,
            may_go_on=lambda: time.monotonic() < until,
        )
    _show(result, model=model, kind=kind, options=options, folder=folder, console=console)
    if options.write and result.chosen:
        write_folder(files, options.write, start=start, chosen=result.chosen.settings)
        console.print(f"the next version's folder: {options.write}", highlight=False)
    return result


def parse_concurrency(text: str) -> Sequence[int]:
    """Reads `1,4,16`.

    Raises:
        CannotRun: these are no numbers of clients.
    """
    parts = text.split(",")
    if len(parts) > MAX_POINTS or not all(
        part.isdecimal() and 0 < int(part) <= MAX_CLIENTS for part in parts
    ):
        raise CliError(
            f"--concurrency takes at most {MAX_POINTS} numbers from 1 to {MAX_CLIENTS}, "
            f"separated by commas, and it is {text!r}"
        )
    return sorted({int(part) for part in parts})


class _Trials:
    """Measures one set of settings after another on one Triton."""

    def __init__(
        self,
        triton: TuningTriton,
        *,
        files: Mapping[str, Path],
        config: str,
        kind: str,
        options: Options,
        console: Console,
    ) -> None:
        self._console = console
        self._triton = triton
        self._files = files
        self._config = config
        self._kind = kind
        self._options = options
        self._numbers = itertools.count()

    def measure(self, settings: Settings) -> Trial:
        name = f"candidate-{next(self._numbers)}"
        points: list[Point] = []
        try:
            with self._triton.loaded(name, self._files, configured(self._config, settings)):
                for concurrency in self._options.concurrency:
                    points.append(self._point(name, concurrency))
                    self._tell(settings, points[-1])
        except CliError as error:
            self._console.print(f"{describe(settings)}: {error}", highlight=False)
            return Trial(settings=settings, points=tuple(points), failure=str(error))
        return Trial(settings=settings, points=tuple(points))

    def _point(self, name: str, concurrency: int) -> Point:
        load = Load(
            address=self._triton.address,
            model=name,
            kind=self._kind,
            seconds=self._options.seconds,
        )
        before = self._cpu_used()
        observed = asyncio.run(observe(load, concurrency))
        used = self._cpu_used().since(before)
        return Point(
            concurrency=concurrency,
            throughput_per_second=observed.units / load.seconds,
            p50_ms=observed.percentile_ms(0.50),
            p95_ms=observed.percentile_ms(0.95),
            requests=observed.requests,
            errors=observed.errors,
            cpu_ms_per_unit=1000 * used.triton_seconds / max(1, observed.all_units),
            neighbours_cores=used.neighbours_cores,
        )

    def _cpu_used(self) -> CpuUsed:
        return CpuUsed.now(triton_seconds=self._triton.cpu_seconds())

    def _tell(self, settings: Settings, point: Point) -> None:
        p95 = "-" if point.p95_ms is None else f"{point.p95_ms:.0f} ms"
        self._console.print(
            f"[dim]{describe(settings)}  {point.concurrency} at once: "
            f"{point.throughput_per_second:.1f} {unit(self._kind)}/s, p95 {p95}[/]",
            highlight=False,
            soft_wrap=True,
        )


def _files(model: str) -> Mapping[str, Path]:
    if model not in bundled_names():
        raise CliError(f"{model} is not a bundled model; there are {', '.join(bundled_names())}")
    try:
        return model_files(model)
    except ArtifactUnavailableError as error:
        raise CliError(str(error)) from error


def _show(
    result: Result, *, model: str, kind: str, options: Options, folder: Path, console: Console
) -> None:
    console.print(table(result, kind=kind, p95_ms=options.p95_ms))
    if not result.complete:
        console.print("the time was up before all was tried: see --limit-seconds")
    unrest = max(
        (point.neighbours_cores for trial in result.trials for point in trial.points), default=0.0
    )
    if unrest > QUIET_CORES:
        console.print(
            f"[yellow]other programs took up to {unrest:.1f} cores meanwhile: measure again on a "
            "quiet machine before you believe this[/]",
            highlight=False,
        )
    if any(point.p95_ms is None for trial in result.trials for point in trial.points):
        console.print("some windows were too short to time a request: see --seconds")
    if result.chosen is None:
        console.print(f"nothing keeps a p95 of {options.p95_ms} ms without errors")
    else:
        same = result.chosen is result.now
        said = "what the version has now stays" if same else "chosen"
        console.print(f"{said}: [b]{describe(result.chosen.settings)}[/]", highlight=False)
    with contextlib.suppress(FileNotFoundError):  # a plot of an earlier run is not this one's
        (folder / "tune.png").unlink()
    write_json(result, folder / "tune.json", model=model, kind=kind, p95_ms=options.p95_ms)
    drawn = draw(result, folder / "tune.png", model=model, kind=kind, p95_ms=options.p95_ms)
    missing = "" if drawn else " (no plot: matplotlib is not installed)"
    console.print(f"kept in {folder}{missing}", highlight=False, soft_wrap=True)
