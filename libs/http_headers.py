"""Formats headers and trailers."""

from __future__ import annotations

from collections.abc import Mapping


def header_lines(headers: Mapping[str, str]) -> str:
    """Returns headers as lines with line breaks.

    Raises:
        ValueError: a value contains a line break: it would add another header.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers) or "\0" in lines:
        raise ValueError("a header's value has more than one line")
    return lines
