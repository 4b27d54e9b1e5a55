"""Copies Triton's log without what exceptions of models say, which may quote requests.

Triton logs each exception in a model's code with its message. The class of the exception and the
lines of code stay. What a model itself prints is its author's matter and is copied as it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import BinaryIO

# Longer lines are copied in parts; of one that was changed, the other parts are left out.
MAX_LINE_BYTES = 64 * 1024
END_WAIT_SECONDS = 1.0

# Triton writes a message in one line, with its line breaks as `\n`.
_FAILURE = re.compile(
    rb'^[EWIF]\d{4} .*?"Failed to process the request\(s\) for [^,]{1,300}, message: '
)
_CLASS = re.compile(rb"[A-Za-z_][\w.]{0,100}(?=:)")
_FRAMES = rb"\n\nAt:\n"  # with backslashes, as in the log
_FRAME = re.compile(rb"  (/[\w./@+-]+\(\d+\): [\w<>.]+)")
_MAX_FRAMES = 20


def copy_log(source: BinaryIO, target: BinaryIO) -> None:
    """Copies until the end of the source."""
    for line in _cleaned(source):
        target.write(line)
        target.flush()


def start_copying(source: BinaryIO, target: BinaryIO) -> threading.Thread:
    """Copies in a thread. Join it with a limit: processes of models may keep the source open."""
    thread = threading.Thread(
        target=copy_log, args=(source, target), name="triton log", daemon=True
    )
    thread.start()
    return thread


def without_words(line: bytes) -> bytes:
    """Returns a line of the log without the message of an exception in it."""
    found = _FAILURE.match(line)
    if found is None:
        return line
    message = line[found.end() :]
    name = _CLASS.match(message)
    kept = found.group() + (name.group() if name else b"an exception")
    frames = [
        frame.group(1)
        for part in message.rpartition(_FRAMES)[2].split(rb"\n")
        if (frame := _FRAME.fullmatch(part))
    ]
    if frames:
        kept += b" at " + b", called at ".join(frames[:_MAX_FRAMES])
    return kept + b'"\n'


def _cleaned(source: BinaryIO) -> Iterator[bytes]:
    skips = False
    while part := source.readline(MAX_LINE_BYTES):
        is_end = part.endswith(b"\n")
        if not skips:
            cleaned = without_words(part)
            skips = cleaned != part
            yield cleaned
        if is_end:
            skips = False
