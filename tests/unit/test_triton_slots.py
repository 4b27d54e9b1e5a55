"""Slots of the engine: whose prompts are read again, and whose are not."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from tests.support.model_code import load_module

Slots = load_module("smollm2", "slots").Slots

SYSTEM = list(range(100))


def answer(slots, salt: str, prompt: list[int]) -> tuple[int, bool]:
    """Returns the slot of an answer, and whether it may use what is in it."""
    with slots.take(salt, prompt) as slot:
        reusable = slot.is_reusable
        slot.fill([*prompt, 7, -1, 8])
        assert slot.is_reusable  # for the next run of the same answer
        return slot.number, reusable


def test_a_tenant_uses_what_its_own_answers_left():
    """The slot with the longest common beginning, also if others were unused for longer."""
    slots = Slots(4)
    first, reusable = answer(slots, "a", [*SYSTEM, 1])
    assert not reusable
    answer(slots, "a", [500, 501])
    assert answer(slots, "a", [*SYSTEM, 1, 7, 2]) == (first, True)


def test_a_tenant_uses_nothing_of_others():
    """Not even where all slots are theirs, and never without a salt."""
    slots = Slots(2)
    for _ in range(2):
        answer(slots, "a", SYSTEM)
    for salt in ("b", "", ""):
        _, reusable = answer(slots, salt, SYSTEM)
        assert not reusable
    assert not answer(slots, "a", SYSTEM)[1]  # b's answer has taken one, and the last ones both


def test_a_short_common_beginning_costs_no_other_conversation_its_cache():
    """The longest unused slot is taken instead."""
    slots = Slots(2)
    kept, _ = answer(slots, "a", SYSTEM)
    other, _ = answer(slots, "a", [0, 1, 2, *range(500, 600)])
    assert other != kept
    assert answer(slots, "a", [*SYSTEM, 5]) == (kept, True)


def test_sharing_is_possible():
    """Where the operator of a model wants it."""
    slots = Slots(2, shared=True)
    first, _ = answer(slots, "a", SYSTEM)
    assert answer(slots, "b", SYSTEM) == (first, True)


def test_a_slot_has_one_answer_at_a_time():
    """Another one waits for it."""
    slots = Slots(2)
    taken = []

    def wait_for_slot() -> None:
        with slots.take("a", SYSTEM) as slot:
            taken.append(slot.number)

    waiting = threading.Thread(target=wait_for_slot)
    with ExitStack() as busy:
        numbers = {busy.enter_context(slots.take("a", SYSTEM)).number for _ in range(2)}
        assert numbers == {0, 1}
        waiting.start()
        waiting.join(0.1)
        assert not taken
    waiting.join(5)
    assert taken


def test_tokens_behind_text_are_not_compared():
    """Their ids are not known."""
    slots = Slots(1)
    with slots.take("a", [1, 2]) as slot:
        slot.fill([1, 2, "text", 3])
        assert slot.common_tokens("a", [1, 2, 3]) == 2
        assert slot.common_tokens("b", [1, 2, 3]) == 0
        assert slot.common_tokens("a", [1, 9, 3]) == 1
        assert slot.common_tokens("a", ["text"]) == 0


def test_a_failed_answer_gives_its_salt_to_nothing_of_others():
    """The engine has not touched the slot: another tenant's tokens are still in it."""
    slots = Slots(1)
    answer(slots, "a", SYSTEM)
    with slots.take("b", SYSTEM):
        pass  # the engine has failed before it began
    for salt in ("b", "a"):
        with slots.take(salt, SYSTEM) as slot:
            assert not slot.is_reusable
            assert slot.common_tokens(salt, SYSTEM) == 0
    assert not answer(slots, "a", SYSTEM)[1]
    assert answer(slots, "a", SYSTEM)[1]
    with slots.take("a", SYSTEM):
        pass
    assert answer(slots, "a", SYSTEM)[1]  # all in it is its own


def test_a_slot_of_a_new_engine_has_no_salt():
    """Not even the empty one."""
    with Slots(1).take("", SYSTEM) as slot:
        assert not slot.is_reusable
        assert slot.common_tokens("", SYSTEM) == 0
