"""A job advances and ends once, whatever arrives twice, late or out of order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import FailedPrecondition
from services.jobs.domain import (
    Finished,
    Job,
    Outcome,
    Started,
    State,
    advance,
    cancel,
    give_up,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
QUEUED = Job(
    job_id="j", tenant="acme", user="ann", payload=b"p", create_time=START, update_time=START
)
ERROR = b"a serialised status"
RETENTION = timedelta(days=7)

attempts = st.integers(1, 8)
outcomes = st.one_of(
    st.builds(Started, attempts),
    st.builds(Finished, attempts, result=st.binary(max_size=4)),
    st.builds(Finished, attempts, error=st.just(ERROR)),
)
moments = st.integers(-100, 100).map(lambda seconds: START + timedelta(seconds=seconds))


def run(job: Job, events: Sequence[tuple[Outcome, datetime]]) -> list[Job]:
    """Returns the job after each event that changed it, the job itself first."""
    states = [job]
    for outcome, now in events:
        changed = advance(states[-1], outcome, now=now, retention=RETENTION)
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
        assert last.expire_time is None
        assert last.error is None
        return
    assert last.state is (State.FAILED if ends[0].result is None else State.SUCCEEDED)
    assert (last.result, last.error) == (ends[0].result, ends[0].error)
    assert last.expire_time == last.update_time + RETENTION


@given(st.lists(st.tuples(outcomes, moments)))
def test_events_that_arrive_twice_change_nothing(events: list[tuple[Outcome, datetime]]) -> None:
    """The bus may deliver each event again, one by one or all together."""
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
    """An empty proto has no bytes; the job has succeeded nevertheless."""
    assert run(QUEUED, [(Finished(1, result=b""), START)])[-1].state is State.SUCCEEDED


def test_a_job_that_has_ended_is_not_given_up() -> None:
    """The reconciler never overwrites what a worker reported."""
    done = run(QUEUED, [(Finished(1, result=b"r"), START)])[-1]
    assert give_up(done, ERROR, now=START, retention=RETENTION) is None
    given_up = give_up(QUEUED, ERROR, now=START, retention=RETENTION)
    assert given_up is not None
    assert (given_up.state, given_up.error) == (State.FAILED, ERROR)


@given(st.lists(st.tuples(outcomes, moments)), st.lists(st.tuples(outcomes, moments)))
def test_a_job_that_has_not_ended_can_be_cancelled_at_any_time(
    before: list[tuple[Outcome, datetime]], after: list[tuple[Outcome, datetime]]
) -> None:
    """It ends at once; cancelling it again and outcomes that arrive later change nothing."""
    job = run(QUEUED, [event for event in before if isinstance(event[0], Started)])[-1]
    cancelled = cancel(job, now=START, retention=RETENTION)
    assert cancelled is not None
    assert cancelled.progress > job.progress
    assert (cancelled.state, cancelled.attempt_count) == (State.CANCELLED, job.attempt_count)
    assert (cancelled.result, cancelled.error) == (None, None)
    assert cancelled.expire_time == cancelled.update_time + RETENTION
    assert cancel(cancelled, now=START, retention=RETENTION) is None
    assert run(cancelled, after) == [cancelled]
    assert give_up(cancelled, ERROR, now=START, retention=RETENTION) is None


@pytest.mark.parametrize(
    ("outcome", "state"),
    [(Finished(1, result=b"r"), "SUCCEEDED"), (Finished(1, error=ERROR), "FAILED")],
)
def test_a_job_that_has_ended_cannot_be_cancelled(outcome: Finished, state: str) -> None:
    """The error says in which state it is."""
    ended = run(QUEUED, [(outcome, START)])[-1]
    with pytest.raises(FailedPrecondition) as caught:
        cancel(ended, now=START, retention=RETENTION)
    assert caught.value.reason == "JOB_NOT_CANCELLABLE"
    assert caught.value.metadata == {"resource": "jobs/j", "state": f"JOB_STATE_{state}"}


def test_a_job_expires_after_it_has_ended() -> None:
    """At the end of its retention, not before; a job that has not ended never does."""
    ended = run(QUEUED, [(Finished(1, result=b"r"), START)])[-1]
    assert not ended.is_expired(START + RETENTION - timedelta(microseconds=1))
    assert ended.is_expired(START + RETENTION)
    assert not QUEUED.is_expired(START + 1000 * RETENTION)
