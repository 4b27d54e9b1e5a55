"""Runs vLLM in this process, with the same interface as the engine for llama.cpp.

Prompts and outputs are token IDs, so that a resumed answer continues exactly after the tokens that
were delivered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from characters import Characters
from contract import ModelError
from special_tokens import SpecialTokens
from stops import Piece

# Makes vLLM use kernels whose results do not depend on the batch. Without it, other requests change
# the rounding and sometimes a greedy choice. It is slower; set it to 0 if speed matters more than
# that a resumed answer equals the original one. Read on import.
os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")

from transformers import AutoTokenizer  # behind the setting
from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

UNKNOWN_TOKEN = -1  # never used by vLLM; needed by the code shared with llama.cpp

_START_SECONDS = 1800.0
# How often cancellation is checked while there is no output, such as during a long prompt.
_POLL_SECONDS = 0.03
_GIVEN_UP = "abort"  # a finish reason of vLLM


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 chooses the likeliest."""

    temperature: float
    top_p: float
    seed: int | None


@dataclass
class Run:
    """The progress of one run of the engine."""

    finish_reason: str = ""
    token_count: int = 0
    cached_tokens: int = 0


class Engine:
    """One model on the GPUs. vLLM runs on its own event loop, in its own thread."""

    def __init__(self, weights: Path, parameters: Mapping[str, str]) -> None:
        folder = weights.parent  # `model.py` passes a file; vLLM reads its folder
        # The file that Triton's vLLM backend reads: arguments of the engine.
        arguments = json.loads((folder / "model.json").read_text())
        if (folder / arguments["model"]).exists():  # part of the artifact and of its digest
            arguments["model"] = str(folder / arguments["model"])
        self.context_tokens = int(arguments["max_model_len"])
        self._top_k = int(parameters["top_k"])
        self._numbers = itertools.count()
        self._shares_cache = parameters["share_prefix_cache"] == "true"
        self._tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
        self.vocabulary_size = len(self._tokenizer)
        self.longest_token_bytes = max(len(each.encode()) for each in self._tokenizer.get_vocab())
        added = self._tokenizer.added_tokens_decoder
        self._special_tokens = SpecialTokens(
            {str(token): number for number, token in added.items()}
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._engine = self._submit(_start(arguments)).result(_START_SECONDS)

    def tokenize_conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the prompt of a conversation, in the template of the model."""
        protected = self._special_tokens.protect(messages)
        rendered = self._tokenizer.apply_chat_template(
            protected.messages, add_generation_prompt=True, tokenize=False
        )
        return self._all_ids(protected.prompt(rendered))

    def tokenize(self, text: str) -> list[int]:
        """Returns the IDs of a text, without a start token; special tokens in it are text."""
        return [
            token_id
            for part in self._special_tokens.broken(text)
            for token_id in self._tokenizer.encode(part, add_special_tokens=False)
        ]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of IDs; incomplete characters become U+FFFD."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @contextmanager
    def session(self, cache_salt: str, _prompt: Sequence[int | str]) -> Iterator[Session]:
        """Runs the engine for one answer.

        vLLM makes the salt part of the hash of each block of its prefix cache: only answers with
        the same salt share blocks. Without a salt the answer has one of its own.
        """
        salt = "" if self._shares_cache else cache_salt or secrets.token_hex(16)
        yield Session(self, salt)

    def run(
        self,
        prompt: Sequence[int | str],
        *,
        cache_salt: str,
        max_tokens: int,
        sampling: Sampling,
        on_piece: Callable[[Piece], bool],
        is_cancelled: Callable[[], bool],
    ) -> Run:
        """See `Session.run`; an empty salt shares the prefix cache with all answers without one."""
        run = Run()
        prompt_ids = self._all_ids(prompt)
        pieces = Characters(self.detokenize, before=prompt_ids)
        outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # `max_tokens` and an end at most
        generating = self._submit(
            self._generate(
                TokensPrompt(
                    prompt_token_ids=prompt_ids,
                    **({"cache_salt": cache_salt} if cache_salt else {}),
                ),
                max_tokens,
                sampling,
                outputs,
            )
        )
        try:
            while not is_cancelled():
                try:
                    output = outputs.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if output is None:
                    _raise_failure(generating)
                    break
                if not _take(output, run, pieces, on_piece):
                    break
        finally:
            generating.cancel()  # vLLM aborts the request
        return run

    async def _generate(
        self,
        prompt: TokensPrompt,
        max_tokens: int,
        sampling: Sampling,
        outputs: queue.SimpleQueue[Any],
    ) -> None:
        settings = SamplingParams(
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=self._top_k,
            seed=sampling.seed,
            output_kind=RequestOutputKind.DELTA,
            # vLLM joins outputs while it is busy; pieces must not depend on that (see Characters).
            detokenize=False,
        )
        try:
            async for output in self._engine.generate(prompt, settings, str(next(self._numbers))):
                outputs.put(output)
        finally:
            outputs.put(None)

    def _all_ids(self, prompt: Sequence[int | str]) -> list[int]:
        return [
            token_id
            for piece in prompt
            for token_id in ([piece] if isinstance(piece, int) else self.tokenize(piece))
        ]

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class Session:
    """The engine, for one answer."""

    def __init__(self, engine: Engine, cache_salt: str) -> None:
        self._engine = engine
        self._cache_salt = cache_salt

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of IDs; incomplete characters become U+FFFD."""
        return self._engine.detokenize(token_ids)

    def run(
        self,
        prompt: Sequence[int | str],
        *,
        max_tokens: int,
        sampling: Sampling,
        on_piece: Callable[[Piece], bool],
        is_cancelled: Callable[[], bool],
    ) -> Run:
        """Generates until the model ends, `max_tokens` are generated, or `on_piece` returns False.

        `on_piece` returns whether to continue. Both callables run in the calling thread.

        Raises:
            ModelError: the engine refused the prompt or failed.
        """
        return self._engine.run(
            prompt,
            cache_salt=self._cache_salt,
            max_tokens=max_tokens,
            sampling=sampling,
            on_piece=on_piece,
            is_cancelled=is_cancelled,
        )


async def _start(arguments: Mapping[str, Any]) -> Any:
    return AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**arguments))


def _take(output: Any, run: Run, pieces: Characters, on_piece: Callable[[Piece], bool]) -> bool:
    """Passes on new output, character by character; returns whether to continue."""
    completion = output.outputs[0]
    if completion.finish_reason == _GIVEN_UP:
        raise ModelError("INTERNAL", "the engine aborted the request")
    run.cached_tokens = max(run.cached_tokens, output.num_cached_tokens or 0)
    made = [pieces.push(token_id) for token_id in completion.token_ids]
    if completion.finish_reason:
        made.append(pieces.flush())
    for number, piece in enumerate(made):
        if not piece.token_ids:
            continue
        run.token_count += len(piece.token_ids)
        # The end of a segment may also be the end of the answer.
        if completion.finish_reason and not any(each.token_ids for each in made[number + 1 :]):
            run.finish_reason = completion.finish_reason
        if not on_piece(piece):
            return False
    return True


def _raise_failure(generating: Future[Any]) -> None:
    try:
        generating.result()
    except Exception as error:
        raise ModelError("INTERNAL", f"the engine failed: {type(error).__name__}") from error
