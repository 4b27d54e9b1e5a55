"""Shows a start on the terminal: a line for each that is ready, and what is waited for."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status


class ConsoleProgress:
    """Prints each process and model when it is ready. Use it in a `with`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._waiting: dict[str, str] = {}
        self._status = Status("starting", console=console)

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._status.stop()

    def starting(self, names: list[str]) -> None:
        """Shows the processes that are waited for."""
        self._waiting = dict.fromkeys(names, "")
        if not self._console.is_terminal:
            self._line(f"starting {', '.join(names)}")
        self._show()

    def step(self, model: str, text: str) -> None:
        """Shows the current step of a model's deployment."""
        self._waiting[model] = f" ({text})"
        if not self._console.is_terminal:
            self._line(f"{model}: {text}")
        self._show()

    def ready(self, name: str) -> None:
        """Prints that a process or a model is ready."""
        self._waiting.pop(name, None)
        seconds = time.monotonic() - self._start
        self._console.print(f"[green]✓[/] {name:<16} [dim]{seconds:5.1f} s[/]", highlight=False)
        self._show()

    def note(self, text: str) -> None:
        """Prints what the user should know."""
        self._console.print(f"! {text}", style="yellow", markup=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        """Prints what a terminal shows in its last line, which a file does not have."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        names = ", ".join(f"{name}{text}" for name, text in self._waiting.items())
        self._status.update(f"waiting for {names}" if names else "")
