"""The figures of a run: printed as a table, and saved in `build/bench.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Names are long; wrapped names are hard to read.
MIN_COLUMNS = 140
BENCH_FILE = Path(__file__).parents[2] / "build" / "bench.json"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: `area.what.how`; the same in every run.
        conditions: what is needed to interpret or repeat it.
    """

    name: str
    value: float
    unit: str
    conditions: str


class Report:
    """Collects the figures of a run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(self, name: str, value: float, unit: str, conditions: str) -> None:
        """Adds a figure."""
        self.rows.append(Row(name, float(f"{value:.4g}"), unit, conditions))

    def note(self, text: str) -> None:
        """Adds a remark, such as what could not be measured."""
        self.notes.append(text)

    def print(self) -> None:
        """Prints the table."""
        table = Table("name", "value", "unit", "conditions")
        table.columns[0].no_wrap = True
        table.columns[1].justify = "right"
        for row in self.rows:
            table.add_row(row.name, f"{row.value:g}", row.unit, row.conditions)
        console = Console(width=max(MIN_COLUMNS, Console().width))
        console.print(table)
        for text in self.notes:
            console.print(text, markup=False)

    def save(self, path: Path = BENCH_FILE) -> None:
        """Merges the figures into the file; replaces figures of the same name."""
        rows: dict[str, dict[str, Any]] = {row["name"]: row for row in _read(path)}
        rows |= {row.name: asdict(row) for row in self.rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())) if path.exists() else []
