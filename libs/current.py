"""A value that is replaced while others read it."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Current(Generic[T]):
    """The current value: one part of a process replaces it, the others only read it.

    Readers take a `Callable[[], T]`, which this is, so they cannot replace the value, and tests can
    pass a lambda.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def __call__(self) -> T:
        """Returns the current value."""
        return self._value

    def replace(self, value: T) -> None:
        """Replaces the current value."""
        self._value = value
