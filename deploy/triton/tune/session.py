"""Tunes a model: loads candidates into a separate Triton, measures, and keeps the result.

Settings are part of a version, so the chosen ones become a new model folder, to be packed as the
next version. A running mesh is not changed, but its work takes cores from the measurement.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deploy.errors import CliError
from deploy.triton.artifact import bundled_names, model_files
from deploy.triton.tune.cpu import CpuUsed
from deploy.triton.tune.load import Load, observe
from deploy.triton.tune.plot import draw
from deploy.triton.tune.report import Report, write_json
from deploy.triton.tune.search import Point, Trial, search
from deploy.triton.tune.server import TuningTriton, tuning_triton
from deploy.triton.tune.settings import Axes, Settings, configured, current, default_axes
from deploy.triton.tune.write import require_new, write_folder

MAX_CLIENTS = 256
MAX_POINTS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        seconds: the length of each measurement.
        concurrency: the numbers of clients to measure with.
        axes: the values to try; empty: the usual ones for the model's kind.
        p95_ms: the longest allowed p95, of an answer or a first token; None: no limit.
        limit_seconds: no new candidate is started after this time.
        write: the new folder for the chosen version; None: none is written.
    """

    seconds: float
    concurrency: Sequence[int]
    axes: Axes
    p95_ms: float | None
    limit_seconds: float
    write: Path | None


class TuneProgress(Protocol):
    """Callbacks for the progress of a measurement."""

    def point(self, kind: str, settings: Settings, point: Point) -> None:
        """Called when a candidate was measured with one number of clients."""

    def failed(self, settings: Settings, message: str) -> None:
        """Called when a candidate cannot be loaded or measured."""


def tune(home: Path, model: str, options: Options, progress: TuneProgress) -> Report:
    """Measures, chooses and keeps the result in `HEADRACE_HOME/tune/<model>`.

    Raises:
        CliError: an option is invalid, or Triton does not start.
    """
    if options.write:
        require_new(options.write)
    files = _files(model)
    kind = str(json.loads(files["headrace.json"].read_text())["kind"])
    config = files["config.pbtxt"].read_text()
    axes = options.axes or default_axes(kind)
    start = current(config, axes)
    for name, values in axes.items():  # refuse invalid values before anything is measured
        for value in values:
            configured(config, {name: value})
    folder = home / "tune" / model
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.limit_seconds
    with tuning_triton(folder / "triton.log") as triton:
        trials = _Trials(
            triton, files=files, config=config, kind=kind, options=options, progress=progress
        )
        result = search(
            start,
            axes,
            measure=trials.measure,
            p95_ms=options.p95_ms,
            may_continue=lambda: time.monotonic() < until,
        )
    (folder / "tune.png").unlink(missing_ok=True)  # an earlier run may have left one
    report = Report(model=model, kind=kind, p95_ms=options.p95_ms, result=result, folder=folder)
    write_json(report)
    draw(report)
    if options.write and result.chosen:
        write_folder(files, options.write, start=start, chosen=result.chosen.settings)
    return report


def parse_concurrency(text: str) -> Sequence[int]:
    """Parses numbers of clients such as `1,4,16`.

    Raises:
        CliError: the text has another form.
    """
    parts = text.split(",")
    if len(parts) > MAX_POINTS or not all(
        part.isdecimal() and 0 < int(part) <= MAX_CLIENTS for part in parts
    ):
        raise CliError(
            f"--concurrency must be up to {MAX_POINTS} numbers from 1 to {MAX_CLIENTS}, "
            f"separated by commas, but it is {text!r}"
        )
    return sorted({int(part) for part in parts})


class _Trials:
    """Measures one set of settings after the other on one Triton."""

    def __init__(
        self,
        triton: TuningTriton,
        *,
        files: Mapping[str, Path],
        config: str,
        kind: str,
        options: Options,
        progress: TuneProgress,
    ) -> None:
        self._triton = triton
        self._files = files
        self._config = config
        self._kind = kind
        self._options = options
        self._progress = progress
        self._numbers = itertools.count()

    def measure(self, settings: Settings) -> Trial:
        name = f"candidate-{next(self._numbers)}"
        points: list[Point] = []
        try:
            with self._triton.loaded(name, self._files, configured(self._config, settings)):
                for concurrency in self._options.concurrency:
                    points.append(self._point(name, concurrency))
                    self._progress.point(self._kind, settings, points[-1])
        except CliError as error:
            self._progress.failed(settings, str(error))
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


def _files(model: str) -> Mapping[str, Path]:
    if model not in bundled_names():
        raise CliError(
            f"{model} is not a bundled model; choose one of {', '.join(bundled_names())}"
        )
    return model_files(model)
