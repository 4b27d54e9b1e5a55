"""Ten thousand changed inputs for each parser of our own; `make fuzz` runs longer, and guided."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.corpus import EXAMPLES, TOKENS
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import TARGETS

INPUTS = 10_000
# Of one input, on a quiet machine, for those that took the longest.
LONGEST_SECONDS = 0.1
_TRIES = 5


def seconds_of(name: str, data: bytes) -> float:
    began = time.perf_counter()
    TARGETS[name](data)
    return time.perf_counter() - began


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_keeps_its_promises_for_any_input(name):
    """No error of another class, none that cannot be sent, and no stall."""
    mutator = Mutator(name, TOKENS.get(name, ()))
    for example in EXAMPLES[name]:
        TARGETS[name](example)
    slowest: list[tuple[float, bytes]] = []
    for _ in range(INPUTS):
        data = mutator.mutated(EXAMPLES[name])
        try:
            slowest.append((seconds_of(name, data), data))
        except BaseException as error:
            error.add_note(f"the input: {data[:1000]!r}, {len(data)} bytes")
            raise
        if len(slowest) > 100:
            slowest = sorted(slowest, reverse=True)[:3]
    for _, data in sorted(slowest, reverse=True)[:3]:
        assert min(seconds_of(name, data) for _ in range(_TRIES)) < LONGEST_SECONDS
