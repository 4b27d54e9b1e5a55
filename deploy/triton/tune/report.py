"""Shows what tuning found: as a table, and as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from deploy.triton.tune.search import Result, Trial
from deploy.triton.tune.settings import Settings


def unit(kind: str) -> str:
    """Returns what the throughput counts."""
    return "texts" if kind == "embedding" else "tokens"


def latency_name(kind: str) -> str:
    """Returns what the latency is of."""
    return "answer" if kind == "embedding" else "first token"


def describe(settings: Settings) -> str:
    """Returns the settings in one line."""
    return ", ".join(f"{name}={value or 'none'}" for name, value in settings.items())


def table(result: Result, *, kind: str, p95_ms: float | None) -> Table:
    """Returns a row for each point; what was chosen stands out."""
    shown = Table(title=_title(kind, p95_ms))
    for name in result.trials[0].settings:
        shown.add_column(name, overflow="fold")
    for name in ("clients", f"{unit(kind)}/s", "p50 ms", "p95 ms", "errors", "CPU ms each"):
        shown.add_column(name, justify="right", overflow="fold")
    for number, trial in enumerate(result.trials):
        _add_trial(shown, trial, chosen=trial is result.chosen, p95_ms=p95_ms)
        if number + 1 < len(result.trials):
            shown.add_section()
    return shown


def write_json(result: Result, path: Path, *, model: str, kind: str, p95_ms: float | None) -> None:
    """Keeps the whole result, and on what it was measured."""
    body = {
        "model": model,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "throughput_unit": f"{unit(kind)}/s",
        "latency_of": latency_name(kind),
        "p95_ms_bound": p95_ms,
        "complete": result.complete,
        "chosen": dict(result.chosen.settings) if result.chosen else None,
        "trials": [asdict(trial) for trial in result.trials],
    }
    path.write_text(json.dumps(body, indent=2) + "\n")


def _add_trial(shown: Table, trial: Trial, *, chosen: bool, p95_ms: float | None) -> None:
    best = trial.best(p95_ms)
    for number, point in enumerate(trial.points):
        names = [value or "none" for value in trial.settings.values()]
        cells = [
            *(names if not number else [""] * len(names)),
            str(point.concurrency),
            f"{point.throughput_per_second:.1f}",
            _ms(point.p50_ms),
            _ms(point.p95_ms),
            str(point.errors),
            f"{point.cpu_ms_per_unit:.2f}",
        ]
        shown.add_row(*cells, style="bold green" if chosen and point is best else None)
    if trial.failure:
        shown.add_row(*[value or "none" for value in trial.settings.values()], "-", "failed")


def _ms(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"


def _title(kind: str, p95_ms: float | None) -> str:
    bound = "" if p95_ms is None else f", p95 at most {p95_ms:g} ms"
    return f"latency: to the {latency_name(kind)}{bound}"
