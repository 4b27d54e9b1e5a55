"""Finds the settings that give the most within a bound of latency.

One setting is varied after the other, each from the best so far: a grid of three settings with
three values each would take four times as long. Two settings that are good only together are
missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.triton.tune.settings import Axes, Settings

# What a machine's own unrest makes up. A change must be worth more.
MIN_GAIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured with so many clients at once.

    Attributes:
        throughput_per_second: texts, or tokens, that came within the window.
        p50_ms: of a text, or of a first token; None where none was begun and answered.
        errors: requests that failed, in all.
        cpu_ms_per_unit: of Triton and its models, for one text or token.
        neighbours_cores: what programs other than Triton and the clients took of the machine.
    """

    concurrency: int
    throughput_per_second: float
    p50_ms: float | None
    p95_ms: float | None
    requests: int
    errors: int
    cpu_ms_per_unit: float
    neighbours_cores: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of settings, measured, or why it could not be."""

    settings: Settings
    points: Sequence[Point] = ()
    failure: str = ""

    def best(self, p95_ms: float | None) -> Point | None:
        """Returns the point with the most throughput that keeps the bound and had no errors."""
        kept = [
            point
            for point in self.points
            if not point.errors
            and (p95_ms is None or (point.p95_ms is not None and point.p95_ms <= p95_ms))
        ]
        return max(kept, key=lambda point: point.throughput_per_second, default=None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found.

    Attributes:
        trials: in their order.
        now: the version as it is, in the measurement that `chosen` is held against.
        chosen: None where nothing keeps the bound.
        complete: whether the time sufficed for all.
    """

    trials: Sequence[Trial]
    now: Trial
    chosen: Trial | None
    complete: bool


Measure = Callable[[Settings], Trial]


def search(
    start: Settings,
    axes: Axes,
    *,
    measure: Measure,
    p95_ms: float | None,
    may_go_on: Callable[[], bool],
) -> Result:
    """Measures and chooses.

    What wins is measured once more, beside the settings of now: the best of many is in part the
    luckiest.
    """
    now = measure(start)
    trials = [now]
    best = now
    complete = True
    for name, values in axes.items():
        for value in values:
            settings = {**best.settings, name: value}
            if any(settings == trial.settings for trial in trials):
                continue
            if not may_go_on():
                complete = False
                break
            trial = measure(settings)
            trials.append(trial)
            if gains(trial, over=best, p95_ms=p95_ms):
                best = trial
    if best is not now:
        now, best = measure(start), measure(best.settings)
        trials += [now, best]
        best = best if gains(best, over=now, p95_ms=p95_ms) else now
    kept = best.best(p95_ms) is not None
    return Result(trials=trials, now=now, chosen=best if kept else None, complete=complete)


def gains(trial: Trial, *, over: Trial, p95_ms: float | None) -> bool:
    """Tells whether a trial is better than another by more than chance."""
    mine, other = trial.best(p95_ms), over.best(p95_ms)
    if mine is None or other is None:
        return mine is not None
    return mine.throughput_per_second > other.throughput_per_second * (1 + MIN_GAIN)
