"""Searches for the settings with the highest throughput within a limit of latency.

Settings are varied one after the other, each from the best so far: a grid of three settings with
three values each would take four times as long. The search misses two settings that are good only
in combination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.triton.tune.settings import Axes, Settings

# The noise of a machine. A change must gain more than this.
MIN_GAIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured with one number of clients.

    Attributes:
        concurrency: the number of clients.
        throughput_per_second: texts or tokens received within the window.
        p50_ms: latency of an answer or a first token; None if no request was sent and answered
            within the window.
        errors: the number of failed requests.
        cpu_ms_per_unit: CPU time of Triton and its models for one text or token.
        neighbours_cores: the cores used by programs other than Triton and the clients.
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
    """The measurement of one set of settings, or why it failed."""

    settings: Settings
    points: Sequence[Point] = ()
    failure: str = ""

    def best(self, p95_ms: float | None) -> Point | None:
        """Returns the point of highest throughput that is within the limit and has no errors."""
        kept = [
            point
            for point in self.points
            if not point.errors
            and (p95_ms is None or (point.p95_ms is not None and point.p95_ms <= p95_ms))
        ]
        return max(kept, key=lambda point: point.throughput_per_second, default=None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a search.

    Attributes:
        trials: in the order of their measurement.
        now: the current settings, in the measurement that `chosen` is compared with.
        chosen: None if no settings are within the limit.
        complete: False if the time ran out.
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
    may_continue: Callable[[], bool],
) -> Result:
    """Measures and chooses.

    The best settings and the current ones are measured again at the end: the best of many
    measurements is partly luck.
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
            if not may_continue():
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
    """Returns whether a trial is better than another by more than noise."""
    mine, other = trial.best(p95_ms), over.best(p95_ms)
    if mine is None or other is None:
        return mine is not None
    return mine.throughput_per_second > other.throughput_per_second * (1 + MIN_GAIN)
