"""The circuit breaker, with a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.inference.backends.breaker import Breaker, BreakerLimits, Permit, State

LIMITS = BreakerLimits(
    consecutive_failures=3,
    failure_share=0.5,
    window_outcomes=10,
    open_seconds=1.0,
    max_open_seconds=8.0,
    max_retry_after_seconds=60.0,
    probes=2,
    probes_to_close=2,
)


def take(breaker: Breaker, now: float) -> Permit:
    permit = breaker.permit(now)
    assert permit is not None
    return permit


def fail_in_row(breaker: Breaker, now: float = 0.0) -> None:
    for _ in range(LIMITS.consecutive_failures):
        breaker.failed(take(breaker, now), now)


def test_failures_in_a_row_open_it():
    """After the last failure that is allowed, not before."""
    breaker = Breaker(LIMITS)
    for _ in range(LIMITS.consecutive_failures - 1):
        breaker.failed(take(breaker, 0), 0)
    assert breaker.state(0) is State.CLOSED
    breaker.failed(take(breaker, 0), 0)
    assert breaker.state(0) is State.OPEN
    assert breaker.permit(0.99) is None
    assert breaker.wait_seconds(0.25) == 0.75


def test_a_success_between_failures_keeps_it_closed():
    """Only failures in a row count."""
    breaker = Breaker(LIMITS)
    for _ in range(2):
        breaker.failed(take(breaker, 0), 0)
        breaker.failed(take(breaker, 0), 0)
        breaker.succeeded(take(breaker, 0))
    assert breaker.state(0) is State.CLOSED


def test_a_backend_that_fails_half_of_the_time_opens_it():
    """The share of failures opens it once the window is full, even if few are in a row."""
    breaker = Breaker(LIMITS)
    for turn in range(LIMITS.window_outcomes):
        assert breaker.state(0) is State.CLOSED
        permit = take(breaker, 0)
        if turn % 2:
            breaker.failed(permit, 0)
        else:
            breaker.succeeded(permit)
    assert breaker.state(0) is State.OPEN


def test_a_few_probes_close_it():
    """While it is half-open, few requests pass at once; when enough of them succeed, all pass."""
    breaker = Breaker(LIMITS)
    fail_in_row(breaker)
    probes = [take(breaker, 1.0) for _ in range(LIMITS.probes)]
    assert breaker.state(1.0) is State.HALF_OPEN
    assert breaker.permit(1.0) is None
    breaker.succeeded(probes[0])
    assert breaker.state(1.0) is State.HALF_OPEN
    breaker.succeeded(probes[1])
    assert breaker.state(1.0) is State.CLOSED


def test_a_failed_probe_opens_it_for_longer():
    """The time doubles up to its limit, and is reset once the backend has worked."""
    breaker = Breaker(LIMITS)
    fail_in_row(breaker)
    now = 0.0
    for seconds in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert breaker.wait_seconds(now) == seconds
        now += seconds
        breaker.failed(take(breaker, now), now)
    now += 8.0
    for probe in [take(breaker, now), take(breaker, now)]:
        breaker.succeeded(probe)
    fail_in_row(breaker, now)
    assert breaker.wait_seconds(now) == LIMITS.open_seconds


@pytest.mark.parametrize(("asked", "kept"), [(20.0, 20.0), (3600.0, 60.0)])
def test_a_requested_wait_is_respected(asked: float, kept: float):
    """One failure is enough, and the wait has a limit of its own."""
    breaker = Breaker(LIMITS)
    breaker.failed(take(breaker, 0), 0, retry_after_seconds=asked)
    assert breaker.wait_seconds(0) == kept


def test_an_abandoned_probe_allows_another_one():
    """A caller that leaves says nothing about the backend and holds no probe."""
    breaker = Breaker(LIMITS)
    fail_in_row(breaker)
    for _ in range(10):
        breaker.abandoned(take(breaker, 1.0))
    assert breaker.state(1.0) is State.HALF_OPEN
    assert breaker.has_permit(1.0)


def test_late_outcomes_are_ignored():
    """Requests from before it opened do not open it again, close it or use up probes."""
    breaker = Breaker(LIMITS)
    late = [take(breaker, 0) for _ in range(30)]
    fail_in_row(breaker)
    probes = [take(breaker, 1.0) for _ in range(LIMITS.probes)]
    for permit in late[:10]:
        breaker.failed(permit, 1.0)
    for permit in late[10:20]:
        breaker.succeeded(permit)
    for permit in late[20:]:
        breaker.abandoned(permit)
    assert breaker.state(1.0) is State.HALF_OPEN
    assert breaker.permit(1.0) is None
    for probe in probes:
        breaker.succeeded(probe)
    assert breaker.state(1.0) is State.CLOSED


class Requests(RuleBasedStateMachine):
    """Requests, outcomes and waits in any order."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(LIMITS)
        self.now = 0.0
        self.held: list[Permit] = []

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 5.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=permits)
    def ask(self) -> Permit | None:
        before, expected = self.breaker.state(self.now), self.breaker.has_permit(self.now)
        permit = self.breaker.permit(self.now)
        assert (permit is not None) == expected
        assert before is not State.CLOSED or permit is not None
        assert before is not State.OPEN or permit is None
        if permit is not None:
            self.held.append(permit)
            running = sum(held.epoch == permit.epoch for held in self.held)
            assert before is not State.HALF_OPEN or running <= LIMITS.probes
        return permit

    @rule(permit=consumes(permits))
    def succeed(self, permit: Permit | None) -> None:
        if permit is not None:
            self.give_back(permit)
            self.breaker.succeeded(permit)

    @rule(permit=consumes(permits), retry_after_seconds=st.sampled_from([0, 0, 0, 2, 500]))
    def fail(self, permit: Permit | None, retry_after_seconds: float) -> None:
        if permit is not None:
            self.give_back(permit)
            self.breaker.failed(permit, self.now, retry_after_seconds=retry_after_seconds)

    @rule(permit=consumes(permits))
    def abandon(self, permit: Permit | None) -> None:
        if permit is not None:
            self.give_back(permit)
            self.breaker.abandoned(permit)

    def give_back(self, permit: Permit) -> None:
        self.held = [held for held in self.held if held is not permit]

    @invariant()
    def the_wait_ends(self) -> None:
        """It never refuses for longer than its limits allow."""
        assert 0 <= self.breaker.wait_seconds(self.now) <= LIMITS.max_retry_after_seconds

    def teardown(self) -> None:
        """A backend that works again is used again, whatever happened before."""
        for permit in self.held:
            self.breaker.abandoned(permit)
        self.now += LIMITS.max_retry_after_seconds
        for _ in range(LIMITS.probes_to_close):
            self.breaker.succeeded(take(self.breaker, self.now))
        assert self.breaker.state(self.now) is State.CLOSED


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
