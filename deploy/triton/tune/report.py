"""The result of tuning as a JSON file, and the words for its numbers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.triton.tune.search import Result
from deploy.triton.tune.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, and where it is kept.

    Attributes:
        kind: `chat` or `embedding`.
        p95_ms: the longest allowed p95; None: no limit.
        folder: has `tune.json`, `triton.log` and, if matplotlib is installed, `tune.png`.
    """

    model: str
    kind: str
    p95_ms: float | None
    result: Result
    folder: Path

    @property
    def plot(self) -> Path:
        """The file of the plot."""
        return self.folder / "tune.png"


def unit(kind: str) -> str:
    """Returns what the throughput counts."""
    return "texts" if kind == "embedding" else "tokens"


def latency_name(kind: str) -> str:
    """Returns the event at which the latency ends."""
    return "answer" if kind == "embedding" else "first token"


def describe(settings: Settings) -> str:
    """Returns the settings in one line."""
    return ", ".join(f"{name}={value or 'none'}" for name, value in settings.items())


def as_json(report: Report) -> Mapping[str, Any]:
    """Returns all results, with the machine they were measured on."""
    result = report.result
    return {
        "model": report.model,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "throughput_unit": f"{unit(report.kind)}/s",
        "latency_of": latency_name(report.kind),
        "p95_ms_bound": report.p95_ms,
        "complete": result.complete,
        "chosen": dict(result.chosen.settings) if result.chosen else None,
        "trials": [asdict(trial) for trial in result.trials],
    }


def write_json(report: Report) -> None:
    """Writes `as_json` into the report's folder."""
    (report.folder / "tune.json").write_text(json.dumps(as_json(report), indent=2) + "\n")
