"""Changes inputs at random, but the same way for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# What parsers of any format stumble over.
TOKENS: Sequence[bytes] = (
    b"\0", b"\xff", b"\x80", b"\x7f", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b",", b":", b";",
    b'"', b"\\", b"{", b"}", b"[", b"]", b"=", b"/", b"..", b"%00", b"\\ud800", b"\\u0000",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"0", b"-1", b"1e400", b"NaN", b"null",
    b"true", b"2147483648", b"-9223372036854775809", b"18446744073709551616", b"9" * 30,
    b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff" * 9 + b"\x01", b"A" * 300,
)  # fmt: skip
MAX_BYTES = 16 * 1024
_MAX_EDITS = 6
_LONGEST_PART = 64


class Mutator:
    """Makes inputs from examples.

    Attributes:
        random: the only source of randomness.
    """

    def __init__(self, seed: str, tokens: Sequence[bytes] = ()) -> None:
        """Creates a mutator; `tokens` are of the format, and are used as often as `TOKENS`."""
        self.random = random.Random(seed)  # noqa: S311  # repeatable, not secret
        self._tokens = [*TOKENS, *(list(tokens) * (1 + len(TOKENS) // max(1, len(tokens))))]
        self._edits: Sequence[Callable[[bytes], bytes]] = (
            self._replace_byte, self._flip_bit, self._insert, self._insert, self._overwrite,
            self._remove, self._repeat, self._cut, self._number,
        )  # fmt: skip

    def mutated(self, examples: Sequence[bytes]) -> bytes:
        """Returns one of the examples, changed in a few places; sometimes two are joined."""
        data = self.random.choice(examples)
        if self.random.random() < 0.1:
            other = self.random.choice(examples)
            data = data[: self._place(data)] + other[self._place(other) :]
        for _ in range(self.random.randint(1, _MAX_EDITS)):
            data = self.random.choice(self._edits)(data)
        return data[:MAX_BYTES]

    def _place(self, data: bytes) -> int:
        return self.random.randint(0, len(data))

    def _replace_byte(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + self.random.randbytes(1) + data[at + 1 :]

    def _flip_bit(self, data: bytes) -> bytes:
        if not data:
            return data
        at = self.random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self.random.randrange(8)]) + data[at + 1 :]

    def _insert(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + self.random.choice(self._tokens) + data[at:]

    def _overwrite(self, data: bytes) -> bytes:
        at, token = self._place(data), self.random.choice(self._tokens)
        return data[:at] + token + data[at + len(token) :]

    def _remove(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + data[at + self.random.randint(1, _LONGEST_PART) :]

    def _repeat(self, data: bytes) -> bytes:
        at = self._place(data)
        part = data[at : at + self.random.randint(1, _LONGEST_PART)]
        return data[:at] + part * self.random.choice((2, 3, 50)) + data[at + len(part) :]

    def _cut(self, data: bytes) -> bytes:
        return data[: self._place(data)] if self.random.random() < 0.3 else data

    def _number(self, data: bytes) -> bytes:
        """Replaces digits by another number, in the same number of bytes where it fits."""
        places = [at for at, each in enumerate(data[:4096]) if 0x30 <= each <= 0x39]
        if not places:
            return data
        at = self.random.choice(places)
        number = str(self.random.choice((0, 1, 7, 8, 255, 65536, 2**31, 2**63))).encode()
        return data[:at] + number + data[at + len(number) :]
