"""When a run of the engine leaves its tokens in a slot, and when what was there before stays."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.model_code import load_module

PROMPT = [1, 2, 3]
PROGRESS = {"choices": [{"finish_reason": None, "text": "", "logprobs": None}]}
TOKEN = {
    "choices": [
        {"finish_reason": "length", "text": "x", "logprobs": {"content": [{"id": 9}]}},
    ],
    "timings": {"predicted_n": 1, "cache_n": 0},
}
ERROR = {"error": {"type": "invalid_request_error"}}


class Server:
    """Answers with these chunks; the real one needs a model in memory."""

    def __init__(self, chunks: Sequence[dict[str, Any]]) -> None:
        self.chunks = chunks

    def handle_completions(self, _request: object, reader: Any) -> None:
        """Calls the reader until it wants no more."""
        for chunk in self.chunks:
            if reader(chunk):
                return


@pytest.fixture
def modules() -> Iterator[dict[str, ModuleType]]:
    """The engine's code without its engine, which is in another environment."""
    loaded: dict[str, ModuleType] = {"xllamacpp": ModuleType("xllamacpp")}
    with patch.dict(sys.modules, loaded):
        for name in ("contract", "slots", "special_tokens", "stops", "vocabulary", "engine"):
            loaded[name] = sys.modules[name] = load_module("smollm2", name)
        yield loaded


def run(modules: dict[str, ModuleType], slot: Any, *chunks: dict[str, Any]) -> None:
    engine = modules["engine"].Engine.__new__(modules["engine"].Engine)
    engine._server, engine._top_k = Server(chunks), 1
    modules["engine"].Session(engine, slot).run(
        PROMPT,
        max_tokens=1,
        sampling=modules["engine"].Sampling(0.0, 1.0, None),
        on_piece=lambda _piece: True,
        is_cancelled=lambda: False,
    )


def test_a_run_that_has_begun_fills_its_slot(modules):
    """With the prompt and what was made, also if it fails then."""
    slots = modules["slots"].Slots(1)
    with slots.take("a", PROMPT) as slot:
        run(modules, slot, PROGRESS, TOKEN)
        assert slot.common_tokens("a", [*PROMPT, 9, 10]) == 4
        with pytest.raises(modules["contract"].ModelError):
            run(modules, slot, PROGRESS, ERROR)
        assert slot.common_tokens("a", [*PROMPT, 9]) == 3


def test_a_run_that_has_not_begun_leaves_another_tenants_tokens_unusable(modules):
    """They are still in the engine, and would tell by the time what they are."""
    slots = modules["slots"].Slots(1)
    with slots.take("a", PROMPT) as slot:
        run(modules, slot, PROGRESS, TOKEN)
    with slots.take("b", PROMPT) as slot:
        for chunks in ([ERROR], []):
            with pytest.raises(modules["contract"].ModelError) if chunks else nullcontext():
                run(modules, slot, *chunks)
            assert not slot.is_reusable
    with slots.take("b", PROMPT) as slot:
        assert not slot.is_reusable
        assert slot.common_tokens("b", PROMPT) == 0
