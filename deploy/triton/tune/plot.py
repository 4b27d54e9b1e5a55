"""Draws the result of tuning if matplotlib is installed, which a mesh does not need."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from deploy.triton.tune.report import Report, describe, latency_name, unit
from deploy.triton.tune.search import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHOSEN, _NOW, _OTHER = "#c1440e", "#1f5f8b", "#9a9a9a"
_SIZE_INCHES = (9.0, 5.5)
_DPI = 120


def draw(report: Report) -> None:
    """Draws latency over throughput, one line per trial, into the report's folder."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - it may not be installed

    result, kind = report.result, report.kind
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot([], [], "o-", color=_OTHER, linewidth=1.0, markersize=5, label="also measured")
    for trial in result.trials:
        if trial is not result.chosen and trial is not result.now:
            _line(axes, trial, color=_OTHER, label="")
    _line(axes, result.now, color=_NOW, label=f"now: {describe(result.now.settings)}")
    if result.chosen and result.chosen is not result.now:
        _line(
            axes, result.chosen, color=_CHOSEN, label=f"chosen: {describe(result.chosen.settings)}"
        )
    if report.p95_ms is not None:
        axes.axhline(report.p95_ms, color="black", linestyle="--", linewidth=1, label="p95 limit")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit(kind)}/s")
    axes.set_ylabel(f"p95 to the {latency_name(kind)}, ms")
    axes.set_title(
        f"{report.model}: one point for each number of clients, one line for each set of settings"
    )
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(report.plot)


def _line(axes: Axes, trial: Trial, *, color: str, label: str) -> None:
    points = [point for point in trial.points if point.p95_ms is not None]
    if not points:
        return
    xs = [point.throughput_per_second for point in points]
    ys = [point.p95_ms or 0.0 for point in points]
    width = 2.2 if label else 1.0
    axes.plot(xs, ys, "o-", color=color, linewidth=width, markersize=5, label=label or None)
    if label:
        for point, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(
                str(point.concurrency),
                (x, y),
                textcoords="offset points",
                xytext=(6, 5),
                fontsize="small",
                color=color,
            )
