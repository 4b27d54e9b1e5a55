"""A transport for connections that are fed by hand."""

from __future__ import annotations

import asyncio
from typing import Any

from typing_extensions import override


class Wire(asyncio.Transport):
    """A transport to a server that sends what the fuzzer makes."""

    closed = False

    @override
    def is_closing(self) -> bool:
        return self.closed

    @override
    def abort(self) -> None:
        self.closed = True

    @override
    def write(self, data: Any) -> None: ...

    @override
    def pause_reading(self) -> None: ...

    @override
    def resume_reading(self) -> None: ...

    @override
    def is_reading(self) -> bool:
        return True

    @override
    def get_write_buffer_size(self) -> int:
        return 0
