"""Which of the engine's slots an answer gets, so that tenants do not share a prefix cache.

A slot keeps the tokens of its last answer: a prompt that begins like it is not read again there. If
that answer was another tenant's, the time to the first token and `cached_tokens` would tell what it
was. So each slot has the cache salt of its last answer, which differs by tenant, and only a prompt
with the same salt uses what is in it. It gets the salt when the engine has begun the answer, and
not before: until then the tokens of the answer before are in it.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

# A prompt goes to the slot that has at least so much of it; otherwise to the one that has been
# unused for longest, so that a short common beginning costs no other conversation its cache.
MIN_SHARE = 0.1

_SHARED = "shared"  # no salt of a tenant: these are hexadecimal


class Slot:
    """One slot of the engine.

    Attributes:
        number: the engine's.
        is_reusable: whether the present answer may use what is in it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_reusable = False
        self._salt = self._next_salt = secrets.token_hex(16)  # of nobody
        self._tokens: list[int] = []

    def start(self, salt: str) -> None:
        """Called before an answer uses the slot."""
        self.is_reusable = salt == self._salt
        self._next_salt = salt
        if not self.is_reusable:
            self._salt = secrets.token_hex(16)  # if the engine fails, nobody uses what is in it
            self._tokens = []

    def fill(self, tokens: Sequence[int | str]) -> None:
        """Called when the engine has read and generated these tokens; texts have unknown ids.

        Not if the engine has not begun: what is in the slot is then another answer's.
        """
        self.is_reusable = True
        self._salt = self._next_salt
        self._tokens = [each for each in takewhile(_is_id, tokens) if isinstance(each, int)]

    def common_tokens(self, salt: str, prompt: Sequence[int | str]) -> int:
        """Returns how many tokens a prompt with this salt would not have to be read here."""
        if salt != self._salt:
            return 0
        low, high = 0, min(len(self._tokens), len(prompt))
        while low < high:  # comparing slices is much faster than comparing tokens in Python
            middle = (low + high + 1) // 2
            if self._tokens[low:middle] == list(prompt[low:middle]):
                low = middle
            else:
                high = middle - 1
        return low


class Slots:
    """All slots of the engine. As many answers run at once at most."""

    def __init__(self, count: int, *, shared: bool = False) -> None:
        """Creates the slots; `shared`: all answers may use each other's tokens."""
        self._shared = shared
        self._free = [Slot(number) for number in range(count)]  # the longest unused first
        self._freed = threading.Condition()

    @contextmanager
    def take(self, salt: str, prompt: Sequence[int | str]) -> Iterator[Slot]:
        """Gives the best free slot to an answer; waits until there is one.

        Args:
            salt: of the tenant; empty: what the answer leaves is used by no other one.
            prompt: what the engine will read.
        """
        salt = _SHARED if self._shared else salt or secrets.token_hex(16)
        with self._freed:
            self._freed.wait_for(lambda: self._free)
            slot = self._best(salt, prompt)
            self._free.remove(slot)
        slot.start(salt)
        try:
            yield slot
        finally:
            with self._freed:
                self._free.append(slot)
                self._freed.notify()

    def _best(self, salt: str, prompt: Sequence[int | str]) -> Slot:
        best = max(self._free, key=lambda slot: slot.common_tokens(salt, prompt))
        if best.common_tokens(salt, prompt) >= max(1, MIN_SHARE * len(prompt)):
            return best
        return self._free[0]


def _is_id(token: int | str) -> bool:
    return isinstance(token, int) and token >= 0
