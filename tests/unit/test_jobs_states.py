"""A job goes forward and ends once, whatever comes twice, late or out of order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.jobs.domain import (
    Failure,
    Finished,
    Job,
    Outcome,
    Started,
    State,
    advance,
    give_up,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
QUEUED = Job(
    job_id="j", tenant="acme", user="ann", payload=b"p", create_time=START, update_time=START
)
FAILURE = Failure("NOT_FOUND", "MODEL_NOT_FOUND", "no such model")

attempts = st.integers(1, 8)
outcomes = st.one_of(
    st.builds(Started, attempts),
    st.builds(Finished, attempts, result=st.binary(max_size=4)),
    st.builds(Finished, attempts, failure=st.just(FAILURE)),
)
moments = st.integers(-100, 100).map(lambda seconds: START + timedelta(seconds=seconds))


def run(job: Job, events: Sequence[tuple[Outcome, datetime]]) -> list[Job]:
    """Returns the job after each event that changed it, the job itself first."""
    states = [job]
    for outcome, now in events:
        changed = advance(states[-1], outcome, now)
        if changed is not None:
            states.append(changed)
    return states


@given(st.lists(st.tuples(outcomes, moments)))
def test_every_change_is_progress(events: list[tuple[Outcome, datetime]]) -> None:
    """State, attempts and time never go back, so a watcher can tell newer from older."""
    states = run(QUEUED, events)
    for before, after in itertools.pairwise(states):
        assert after.progress > before.progress
        assert after.state > before.state or after.attempt_count > before.attempt_count
        assert after.update_time >= before.update_time


@given(st.lists(st.tuples(outcomes, moments)))
def test_the_first_end_is_the_end(events: list[tuple[Outcome, datetime]]) -> None:
    """Later outcomes, of whatever attempt, change nothing."""
    ends = [outcome for outcome, _ in events if isinstance(outcome, Finished)]
    last = run(QUEUED, events)[-1]
    if not ends:
        assert not last.state.terminal
        assert last.result is None
        assert last.failure is None
        return
    assert last.state is (State.FAILED if ends[0].result is None else State.SUCCEEDED)
    assert (last.result, last.failure) == (ends[0].result, ends[0].failure)


@given(st.lists(st.tuples(outcomes, moments)))
def test_hearing_it_all_twice_changes_nothing(events: list[tuple[Outcome, datetime]]) -> None:
    """The bus may deliver each event again, one by one or the whole lot."""
    each_twice = [event for event in events for _ in range(2)]
    assert run(QUEUED, each_twice) == run(QUEUED, events)
    last = run(QUEUED, events)[-1]
    if last.state.terminal:
        assert run(last, events) == [last]


@given(st.lists(attempts, min_size=1))
def test_attempts_are_counted_by_the_highest(starts: list[int]) -> None:
    """A late start of an earlier attempt does not hide the later one."""
    events = [(Started(attempt), START) for attempt in starts]
    last = run(QUEUED, events)[-1]
    assert (last.state, last.attempt_count) == (State.RUNNING, max(starts))


def test_an_empty_result_is_a_result() -> None:
    """A proto with nothing in it serialises to no bytes; the job has succeeded all the same."""
    assert run(QUEUED, [(Finished(1, result=b""), START)])[-1].state is State.SUCCEEDED


def test_a_job_that_has_ended_is_not_given_up() -> None:
    """The reconciler never overwrites what a worker brought."""
    done = run(QUEUED, [(Finished(1, result=b"r"), START)])[-1]
    assert give_up(done, FAILURE, START) is None
    given_up = give_up(QUEUED, FAILURE, START)
    assert given_up is not None
    assert (given_up.state, given_up.failure) == (State.FAILED, FAILURE)
