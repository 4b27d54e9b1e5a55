"""A value that is replaced while others read it."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Current(Generic[T]):
    """The value in force: one part of a process replaces it, the others are given the reader.

    Readers take a `Callable[[], T]`, which this is: they cannot replace the value, and tests give
    them a lambda.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def __call__(self) -> T:
        """Returns the value in force."""
        return self._value

    def replace(self, value: T) -> None:
        """Puts another value into force."""
        self._value = value
