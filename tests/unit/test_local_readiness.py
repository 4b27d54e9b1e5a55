"""Which processes are given up during a start."""

from __future__ import annotations

from deploy.local.readiness import StartFailures
from deploy.local.supervisor import ProcessState


def _state(state: str, pid: int = 0) -> list[ProcessState]:
    return [ProcessState(name="cost", state=state, pid=pid)]


def test_a_process_that_ends_again_has_failed():
    """Whether the supervisor waits before the next try or has started it already."""
    failures = StartFailures()
    assert failures.update(_state("RUNNING", 1)) == []
    assert failures.update(_state("BACKOFF")) == []
    assert failures.update(_state("RUNNING", 2)) == []
    assert failures.update(_state("RUNNING", 2)) == []
    assert failures.update(_state("RUNNING", 3)) == ["cost"]


def test_a_process_that_waits_for_its_third_start_has_failed():
    """The longer pauses of the supervisor are not waited for."""
    failures = StartFailures()
    failures.update(_state("STARTING", 1))
    failures.update(_state("STARTING", 2))
    assert failures.update(_state("BACKOFF")) == ["cost"]


def test_a_process_that_the_supervisor_gave_up_has_failed():
    """At once."""
    assert StartFailures().update(_state("FATAL")) == ["cost"]
