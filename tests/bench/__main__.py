"""Runs the areas that are named, or all: `python -m tests.bench [area …]`.

An area is a module `bench_<area>.py` with `run(report)`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tests.bench.report import BENCH_FILE, Report


def main() -> int:
    """Measures, prints and saves; returns the exit status."""
    known = sorted(path.stem.removeprefix("bench_") for path in _folder().glob("bench_*.py"))
    wanted = sys.argv[1:] or known
    unknown = set(wanted) - set(known)
    if unknown:
        print(f"no area {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    # What others do on the machine is part of the conditions.
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f} before the run")
    for area in wanted:
        report = Report()
        try:
            importlib.import_module(f"tests.bench.bench_{area}").run(report)
        finally:  # what was measured before a failure is worth having
            report.print()
            report.save()
    print(f"saved in {BENCH_FILE}")
    return 0


def _folder() -> Path:
    return Path(__file__).parent


if __name__ == "__main__":
    sys.exit(main())
