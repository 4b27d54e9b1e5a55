"""Leaves out of Triton's log what may quote a request: the texts of models' exceptions."""

from __future__ import annotations

import re
from typing import IO

# A line of Triton's log has the whole text, with `\n` for the ends of its lines.
_FAILED = re.compile(
    r"(?P<what>Failed to process the request\(s\) for model[^']*'[^']*', message: )"
    r"(?P<name>[A-Za-z_][\w.]*(?:Error|Exception))?(?P<text>.*)"
)
_FRAMES = re.compile(r"\\nAt:\\n(?P<frames>(?:  \S+\(\d+\): [\w<>.]+(?:\\n)?)+)\"?\s*$")
# What Triton says itself, in place of a model.
_OF_TRITON = re.compile(r"Stub process '[^']*' is not healthy")
_MAX_LINE_BYTES = 64 * 1024


def without_inputs(line: str) -> str:
    """Returns a line of the log without the text of an exception; its class and frames stay."""
    found = _FAILED.search(line)
    if found is None or (found["name"] is None and _OF_TRITON.match(found["text"])):
        return line
    frames = _FRAMES.search(found["text"])
    name = found["name"] or "an exception"
    where = f"; at: {frames['frames'].strip()}" if frames is not None else ""
    left_out = f"{name} (its text is left out: it may quote the request){where}"
    return f"{line[: found.start()]}{found['what']}{left_out}\n"


def forward(source: IO[bytes], target: IO[bytes]) -> None:
    """Copies a log line by line until it ends.

    Longer lines are copied in parts. Of one that was changed, the other parts are left out.
    """
    is_rest = left_out = False
    while part := source.readline(_MAX_LINE_BYTES):
        line = part.decode(errors="replace")
        if not is_rest:
            cleaned = without_inputs(line)
            left_out = cleaned != line
            target.write(cleaned.encode())
        elif not left_out:
            target.write(line.encode())
        is_rest = not part.endswith(b"\n")
        target.flush()
