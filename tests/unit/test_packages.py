"""Rules for all Python packages and files of the project."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("services", "libs", "cli", "deploy", "tests")
GENERATED = ROOT / "libs/gen"
MAX_MEDIAN_LINES = 150
MAX_LINES = 400


def _files(pattern: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob(pattern)]
    return sorted(path for path in found if not path.is_relative_to(GENERATED))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", _files("__init__.py"), ids=_name)
def test_each_package_says_what_it_is(path: Path):
    """The docstring of a package says what it is, and what others may use of it."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{_name(path)} has no docstring: write what the package is"


def test_the_median_file_is_short():
    """Most files can be read at a glance."""
    assert statistics.median(map(_line_count, _files("*.py"))) <= MAX_MEDIAN_LINES


def test_no_file_is_long():
    """A longer file should be divided."""
    assert not [_name(path) for path in _files("*.py") if _line_count(path) > MAX_LINES]


def _line_count(path: Path) -> int:
    return len(path.read_text().splitlines())
