"""Runs the named areas, or all of them: `python -m tests.bench [area …]`.

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
    areas = sys.argv[1:] or known
    unknown = set(areas) - set(known)
    if unknown:
        print(f"no area {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    # Other load on the machine is one of the conditions.
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f} before the run")
    for area in areas:
        report = Report()
        try:
            importlib.import_module(f"tests.bench.bench_{area}").run(report)
        finally:  # also after a failure: figures that were measured before it are valid
            report.print()
            report.save()
    print(f"saved in {BENCH_FILE}")
    return 0


def _folder() -> Path:
    return Path(__file__).parent


if __name__ == "__main__":
    sys.exit(main())
