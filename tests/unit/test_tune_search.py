"""Which settings win."""

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
    """Searches where `worth(settings, times measured before)` gives the points."""
    seen: list[dict[str, str]] = []

    def measure(settings):
        trial = Trial(settings=settings, points=worth(settings, seen.count(dict(settings))))
        seen.append(dict(settings))
        return trial

    result = search(
        NOW, AXES, measure=measure, p95_ms=p95_ms, may_go_on=lambda: len(seen) < trial_limit
    )
    return result, seen


def test_each_setting_is_varied_from_the_best_so_far():
    """And the winner is measured again beside what there is now."""
    worth = {("0", "1"): 100, ("1", "1"): 120, ("1", "2"): 150, ("0", "2"): 500}
    result, seen = find(lambda s, _: [point(worth[s["delay"], s["instances"]])])
    best = {"delay": "1", "instances": "2"}
    assert result.chosen.settings == best
    assert seen == [NOW, {"delay": "1", "instances": "1"}, best, NOW, best]


def test_luck_does_not_win():
    """What was faster once and not again leaves things as they are."""

    def worth(settings, times):
        lucky = settings["instances"] == "2" and not times
        return [point(200 if lucky else 100)]

    result, _ = find(worth)
    assert result.chosen.settings == NOW
    assert result.chosen is result.now


def test_a_little_more_is_not_enough():
    """Within the machine's own unrest nothing changes, and nothing is measured again."""
    result, seen = find(lambda s, _: [point(100 + 2 * int(s["delay"]) + int(s["instances"]))])
    assert result.chosen.settings == NOW
    assert len(seen) == 3


def test_the_bound_decides_before_throughput():
    """The fastest is too slow to answer."""

    def worth(settings, _):
        fast = settings["instances"] == "2"
        return [point(900, p95_ms=80)] if fast else [point(100, p95_ms=20)]

    result, _ = find(worth, p95_ms=50)
    assert result.chosen.settings == NOW


def test_where_nothing_keeps_the_bound_nothing_is_chosen():
    """Not even what there is now."""
    result, _ = find(lambda *_: [point(100, p95_ms=80)], p95_ms=50)
    assert result.chosen is None


def test_what_keeps_the_bound_beats_what_does_not():
    """However slow it is."""

    def worth(settings, _):
        keeps = settings["delay"] == "1"
        return [point(10, p95_ms=20)] if keeps else [point(900, p95_ms=80)]

    result, _ = find(worth, p95_ms=50)
    assert result.chosen.settings["delay"] == "1"


def test_when_the_time_is_up_it_says_so():
    """Of what was measured the best is chosen."""
    result, seen = find(lambda s, _: [point(100 * (1 + int(s["delay"])))], trial_limit=2)
    assert not result.complete
    assert {"delay": "1", "instances": "2"} not in seen
    assert result.chosen.settings == {"delay": "1", "instances": "1"}


def test_a_trial_counts_by_its_best_point_without_errors():
    """Refusing is no way to be fast; and what was not answered keeps no bound."""
    trial = Trial(settings=NOW, points=[point(50), point(90), point(400, errors=1)])
    assert trial.best(None) == point(90)
    unanswered = Trial(settings=NOW, points=[point(90, p95_ms=None)])
    assert unanswered.best(50) is None


def test_a_candidate_that_does_not_load_never_wins():
    """It has no points."""
    failed = Trial(settings=NOW, failure="Triton: no")
    assert not gains(failed, over=Trial(settings=NOW, points=[point(1)]), p95_ms=None)
