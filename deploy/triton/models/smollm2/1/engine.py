"""llama.cpp in this process: renders conversations, counts tokens, generates in shared batches."""

from __future__ import annotations

import http.client
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xllamacpp
from contract import ModelError
from slots import Slot, Slots
from special_tokens import SpecialTokens
from stops import Piece
from vocabulary import read_vocabulary

UNKNOWN_TOKEN = -1  # stands for a token whose id the engine does not tell

_HTTP_TIMEOUT_SECONDS = 30.0
_SILENT = -1
_RANDOM_SEED = 2**32 - 1  # the engine takes this seed as a wish for none


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; temperature 0 takes the likeliest."""

    temperature: float
    top_p: float
    seed: int | None


@dataclass
class Run:
    """What one run of the engine has done so far."""

    finish_reason: str = ""
    token_count: int = 0
    cached_tokens: int = 0


class Engine:
    """One model in memory, with `n_parallel` slots that are decoded together."""

    def __init__(self, weights: Path, parameters: Mapping[str, str]) -> None:
        n_parallel = int(parameters["n_parallel"])
        self.context_tokens = int(parameters["context_tokens"])
        self._top_k = int(parameters["top_k"])
        vocabulary = read_vocabulary(weights)
        self.vocabulary_size = vocabulary.size
        self.longest_token_bytes = vocabulary.longest
        self._special_tokens = SpecialTokens(vocabulary.special)
        self._slots = Slots(n_parallel, shared=parameters["share_prefix_cache"] == "true")
        # The engine opens an HTTP listener on the loopback, the only way to its template. The
        # sandbox allows one port.
        self._api_key = secrets.token_urlsafe(32)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(weights)
        settings.n_parallel = n_parallel
        settings.n_ctx = n_parallel * self.context_tokens
        settings.n_batch = settings.n_ubatch = int(parameters["n_batch"])
        threads = int(parameters["threads"]) or default_threads()
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_ram_mib = 0
        settings.ui = False
        settings.port = int(os.environ.get("HEADRACE_ENGINE_PORT", "0"))
        settings.endpoint_slots = False
        settings.api_keys = [self._api_key]
        settings.verbosity = _SILENT
        self._server = xllamacpp.Server(settings)
        self._address = urlsplit(self._server.listening_address).netloc

    def tokenize_conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the prompt of a conversation, in the model's own template.

        Special tokens are those of the template alone: in contents they are text.

        Raises:
            ModelError: INVALID_FIELD, such as for two answers at the end; or INTERNAL.
        """
        protected = self._special_tokens.protect(messages)
        refused = ModelError(
            "INVALID_FIELD",
            "messages: the model's template refuses these roles in this order",
            field="messages",
        )
        body = {"messages": protected.messages}
        rendered = self._post("/apply-template", body, refused=refused)["prompt"]
        return self.tokenize(protected.prompt(rendered))

    def tokenize(self, text: str | Sequence[int | str]) -> list[int]:
        """Returns the ids of a text, or of texts between ids; special tokens in them are text."""
        body = {"content": text, "add_special": False, "parse_special": False}
        return list(self._post("/tokenize", body)["tokens"])

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of some ids; halves of characters become U+FFFD."""
        return str(self._post("/detokenize", {"tokens": list(token_ids)})["content"])

    def _post(
        self, path: str, body: Mapping[str, Any], *, refused: ModelError | None = None
    ) -> Any:
        host, _, port = self._address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=_HTTP_TIMEOUT_SECONDS)
        headers = {"Authorization": f"Bearer {self._api_key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if refused is not None and response.status == http.client.BAD_REQUEST:
            raise refused
        if response.status != http.client.OK:
            # Not its message, which may quote the prompt.
            raise ModelError("INTERNAL", f"the engine answered {path} with {response.status}")
        return answer

    @contextmanager
    def session(self, cache_salt: str, prompt: Sequence[int | str]) -> Iterator[Session]:
        """Gives a slot to one answer, for one run of the engine after another.

        Args:
            cache_salt: of what earlier answers with the same salt left in the engine the prompt's
                beginning is not read again; empty: there is no such answer.
            prompt: of the first run.
        """
        with self._slots.take(cache_salt, prompt) as slot:
            yield Session(self, slot)

    def run(
        self,
        prompt: Sequence[int | str],
        *,
        slot: Slot,
        max_tokens: int,
        sampling: Sampling,
        on_piece: Callable[[Piece], bool],
        is_cancelled: Callable[[], bool],
    ) -> Run:
        """See `Session.run`."""
        reader = _ChunkReader(self, on_piece, is_cancelled)
        try:
            self._server.handle_completions(
                {
                    "prompt": list(prompt),
                    "id_slot": slot.number,
                    "n_predict": max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": self._top_k,
                    "min_p": 0.0,
                    **({} if sampling.seed is None else {"seed": sampling.seed % _RANDOM_SEED}),
                    # False: what another tenant left in the slot is not even compared.
                    "cache_prompt": slot.is_reusable,
                    "stream": True,
                    "logprobs": 1,  # brings the ids
                    "timings_per_token": True,  # brings the count, ids or not
                    "return_progress": True,  # brings callbacks while the prompt is read
                },
                reader,
            )
        finally:
            if reader.has_begun:
                slot.fill([*prompt, *reader.token_ids])
        if reader.error is not None:
            raise reader.error
        return reader.run


class Session:
    """A slot of the engine, for one answer."""

    def __init__(self, engine: Engine, slot: Slot) -> None:
        self._engine = engine
        self._slot = slot

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of some ids; halves of characters become U+FFFD."""
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
        """Generates until the model ends, `max_tokens` are made, or the caller wants no more.

        `on_piece` returns whether to go on. Both callables run in the calling thread,
        `is_cancelled` also while the prompt is read.

        Raises:
            ModelError: the engine refused the prompt or failed.
        """
        return self._engine.run(
            prompt,
            slot=self._slot,
            max_tokens=max_tokens,
            sampling=sampling,
            on_piece=on_piece,
            is_cancelled=is_cancelled,
        )


class _ChunkReader:
    """Reads the engine's chunks; the engine calls it with each and stops when it returns True."""

    def __init__(
        self,
        engine: Engine,
        on_piece: Callable[[Piece], bool],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.run = Run()
        self.error: Exception | None = None
        self.has_begun = False  # the slot has none of an earlier answer's tokens that differ
        self.token_ids: list[int] = []
        self._engine = engine
        self._on_piece = on_piece
        self._is_cancelled = is_cancelled

    def __call__(self, chunk: dict[str, Any]) -> bool:
        try:
            return self._read(chunk)
        except Exception as error:  # noqa: BLE001  # must not unwind through the engine's frames
            self.error = error
            return True

    def _read(self, chunk: dict[str, Any]) -> bool:
        if "error" in chunk:
            kind = chunk["error"].get("type")  # not its message, which may quote the prompt
            raise ModelError("INTERNAL", f"the engine failed: {kind}")
        self.has_begun = True
        timings = chunk.get("timings") or {}
        self.run.cached_tokens = timings.get("cache_n", self.run.cached_tokens)
        choice = chunk["choices"][0]
        self.run.finish_reason = choice["finish_reason"] or ""
        made = timings.get("predicted_n", 0) - self.run.token_count
        go_on = True
        if made > 0:
            self.run.token_count += made
            reported = [token["id"] for token in (choice["logprobs"] or {}).get("content", ())]
            text = choice["text"]
            piece = Piece(text, self._all_ids(text, reported, made))
            self.token_ids.extend(piece.token_ids)
            go_on = self._on_piece(piece)
        return not go_on or self._is_cancelled()

    def _all_ids(self, text: str, reported: list[int], made: int) -> tuple[int, ...]:
        """Returns `made` ids. Of a character of several tokens the engine reports only the last id.

        Its text is tokenized again; where that gives as many tokens and the same last one, it is
        taken for what the model said.
        """
        if len(reported) == made:
            return tuple(reported)
        if text and reported:
            again = self._engine.tokenize(text)
            if len(again) == made and again[-1] == reported[-1]:
                return tuple(again)
        return (*[UNKNOWN_TOKEN] * (made - len(reported)), *reported)


def default_threads() -> int:
    """Returns half of the cores that this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
