"""The definitions of what travels on the bus fit together."""

from __future__ import annotations

import pytest

from libs.bus import subjects
from libs.bus.subjects import (
    BROADCAST_TYPES,
    COST,
    JOB_RECORDS,
    MESSAGE_TYPES,
    STREAMS,
    WORKER,
    Consumer,
)


def test_each_subject_is_stored_or_broadcast_and_has_one_message_type() -> None:
    """Each subject has a stream and a message type."""
    kept = [subject for stream in STREAMS for subject in stream.subjects]
    named = {
        value
        for value in vars(subjects).values()
        if isinstance(value, str) and value.startswith("headrace.") and value.count(".") == 3
    }
    assert len(kept) == len(set(kept))
    assert set(kept) == set(MESSAGE_TYPES)
    assert set(kept) | set(BROADCAST_TYPES) == named
    assert not set(kept) & set(BROADCAST_TYPES)


def test_each_stream_has_one_consumer() -> None:
    """A work queue takes no second one."""
    assert {consumer.stream.name for consumer in (COST, WORKER, JOB_RECORDS)} == {
        stream.name for stream in STREAMS
    }


@pytest.mark.parametrize("consumer", [COST, WORKER, JOB_RECORDS], ids=lambda c: c.name)
def test_a_message_is_remembered_longer_than_it_is_tried(consumer: Consumer) -> None:
    """A message that a publisher repeats within its retries is stored once."""
    assert consumer.stream.duplicate_window_seconds >= 60
    assert consumer.retry_delays_seconds == tuple(sorted(consumer.retry_delays_seconds))


def test_what_is_money_or_a_record_is_never_given_up() -> None:
    """The ledger and the job records try for ever; only jobs themselves may fail for good."""
    assert COST.max_attempts is None
    assert JOB_RECORDS.max_attempts is None
    assert WORKER.max_attempts is not None
