"""Reads the lines that the programs of a mesh log, whatever their format, as one kind of record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

# Of Triton (in UTC, without a year), Envoy, NATS and supervisord (in the machine's time zone).
_FORMATS = (
    re.compile(r"(?P<level>[IWEF])(?P<triton>\d{4} [\d:.]{15}) +\d+ (?P<text>.*)"),
    re.compile(r"\[(?P<time>\d{4}-\d\d-\d\d [\d:.]{12})\]\[\d+\]\[(?P<level>\w+)\](?P<text>.*)"),
    re.compile(r"\[\d+\] (?P<time>\d{4}/\d\d/\d\d [\d:.]{15}) \[(?P<level>\w+)\] (?P<text>.*)"),
    re.compile(r"(?P<time>\d{4}-\d\d-\d\d [\d:]{8},\d{3}) (?P<level>[A-Z]+) (?P<text>.*)"),
)
_LEVELS: Mapping[str, str] = {
    "i": "info", "inf": "info", "dbg": "debug", "trc": "debug", "debg": "debug", "w": "warning",
    "wrn": "warning", "warn": "warning", "e": "error", "err": "error", "erro": "error",
    "f": "error", "ftl": "error", "crit": "error", "critical": "error",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """One line of a log.

    Attributes:
        process: whose log it is in.
        time: in UTC; None where the line has none, as those of a traceback.
        level: `debug`, `info`, `warning` or `error`; empty without a time.
        text: what happened.
        values: what is known about it.
        raw: the line as it was written.
    """

    process: str
    raw: str
    text: str
    time: datetime | None = None
    level: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def parse(process: str, raw: str, *, now: datetime) -> LogLine:
    """Reads one line. `now` gives the year where the line has none."""
    if raw.startswith("{"):
        try:
            values = json.loads(raw)
            time = datetime.fromisoformat(values.pop("time")).astimezone(UTC)
        except (ValueError, KeyError, TypeError, AttributeError):
            return LogLine(process=process, raw=raw, text=raw)
        text, level = str(values.pop("event", "")), str(values.pop("level", "info"))
        values.pop("service", None)
        return LogLine(process=process, raw=raw, text=text, time=time, level=level, values=values)
    for pattern in _FORMATS:
        if found := pattern.fullmatch(raw):
            parts = found.groupdict()
            level = parts["level"].lower()
            return LogLine(
                process=process,
                raw=raw,
                text=parts["text"].strip(),
                time=_time(parts, now),
                level=_LEVELS.get(level, level),
            )
    return LogLine(process=process, raw=raw, text=raw)


def as_json(line: LogLine) -> str:
    """Returns the line as it was written if that is JSON, or else its record as JSON."""
    if line.values or line.raw.startswith('{"'):
        return line.raw
    record = {"service": line.process, "event": line.text, "level": line.level}
    return json.dumps(record | ({"time": line.time.isoformat()} if line.time else {}))


def _time(parts: Mapping[str, str | None], now: datetime) -> datetime:
    if triton := parts.get("triton"):  # without a year, in UTC
        moment = datetime.strptime(f"{now.year}{triton}", "%Y%m%d %H:%M:%S.%f").replace(tzinfo=UTC)
        return moment.replace(year=now.year - 1) if moment > now else moment
    text = (parts["time"] or "").replace("/", "-").replace(",", ".")
    return datetime.fromisoformat(text).astimezone(UTC)
