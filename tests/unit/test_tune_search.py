"""Which settings are chosen."""

from __future__ import annotations

from deploy.triton.tune.search import Point, Trial, gains, search

AXES = {"delay": ("0", "1"), "instances": ("1", "2")}
NOW = {"delay": "0", "instances": "1"}


def point(throughput: float, *, p95_ms: float | None = 10.0, errors: int = 0) -> Point:
    return Point(
        concurrency=1,
        throughput_per_second=throughput,
        p50_ms=p95_ms,
        p95_ms=p95_ms,
        requests=10,
        errors=errors,
        cpu_ms_per_unit=1.0,
        neighbours_cores=0.0,
    )


def find(worth, *, p95_ms: float | None = None, trial_limit: int = 99):
    """Searches with `worth(settings, times measured before)` as the measured points."""
    seen: list[dict[str, str]] = []

    def measure(settings):
        trial = Trial(settings=settings, points=worth(settings, seen.count(dict(settings))))
        seen.append(dict(settings))
        return trial

    result = search(
        NOW, AXES, measure=measure, p95_ms=p95_ms, may_continue=lambda: len(seen) < trial_limit
    )
    return result, seen


def test_each_setting_is_varied_from_the_best_so_far():
    """And the best is measured again together with the current settings."""
    worth = {("0", "1"): 100, ("1", "1"): 120, ("1", "2"): 150, ("0", "2"): 500}
    result, seen = find(lambda s, _: [point(worth[s["delay"], s["instances"]])])
    best = {"delay": "1", "instances": "2"}
    assert result.chosen.settings == best
    assert seen == [NOW, {"delay": "1", "instances": "1"}, best, NOW, best]


def test_one_lucky_measurement_is_not_enough():
    """If the repeated measurement is not faster, the current settings stay."""

    def worth(settings, times):
        lucky = settings["instances"] == "2" and not times
        return [point(200 if lucky else 100)]

    result, _ = find(worth)
    assert result.chosen.settings == NOW
    assert result.chosen is result.now


def test_a_gain_within_the_noise_is_not_enough():
    """The current settings stay, and nothing is measured again."""
    result, seen = find(lambda s, _: [point(100 + 2 * int(s["delay"]) + int(s["instances"]))])
    assert result.chosen.settings == NOW
    assert len(seen) == 3


def test_the_limit_of_latency_comes_before_throughput():
    """The highest throughput has too long a latency."""

    def worth(settings, _):
        fast = settings["instances"] == "2"
        return [point(900, p95_ms=80)] if fast else [point(100, p95_ms=20)]

    result, _ = find(worth, p95_ms=50)
    assert result.chosen.settings == NOW


def test_nothing_is_chosen_if_nothing_is_within_the_limit():
    """Not even the current settings."""
    result, _ = find(lambda *_: [point(100, p95_ms=80)], p95_ms=50)
    assert result.chosen is None


def test_settings_within_the_limit_are_better_than_others():
    """Whatever their throughput."""

    def worth(settings, _):
        keeps = settings["delay"] == "1"
        return [point(10, p95_ms=20)] if keeps else [point(900, p95_ms=80)]

    result, _ = find(worth, p95_ms=50)
    assert result.chosen.settings["delay"] == "1"


def test_the_result_is_incomplete_when_the_time_runs_out():
    """The best of the measured settings is chosen."""
    result, seen = find(lambda s, _: [point(100 * (1 + int(s["delay"])))], trial_limit=2)
    assert not result.complete
    assert {"delay": "1", "instances": "2"} not in seen
    assert result.chosen.settings == {"delay": "1", "instances": "1"}


def test_a_trial_counts_by_its_best_point_without_errors():
    """Points with errors or without an answer do not count."""
    trial = Trial(settings=NOW, points=[point(50), point(90), point(400, errors=1)])
    assert trial.best(None) == point(90)
    unanswered = Trial(settings=NOW, points=[point(90, p95_ms=None)])
    assert unanswered.best(50) is None


def test_a_candidate_that_does_not_load_is_never_chosen():
    """It has no points."""
    failed = Trial(settings=NOW, failure="Triton: no")
    assert not gains(failed, over=Trial(settings=NOW, points=[point(1)]), p95_ms=None)
