"""SECURITY.md names tests, files and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
MAX_LINES = 250


def test_it_is_short() -> None:
    """Nobody reads a long one."""
    assert TEXT.count("\n") <= MAX_LINES


def test_every_named_test_exists() -> None:
    """A promise without its test is a hope."""
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 10
    existing = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert named - existing == set()


def test_every_link_leads_to_a_file() -> None:
    """Of this repository."""
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_named_setting_is_described_elsewhere() -> None:
    """In the code that reads it, or in the guide of its part."""
    paths = [ROOT / "deploy" / "binaries.json", *(ROOT / "docs").rglob("*.md")]
    for folder in ("deploy", "libs", "services", "cli"):
        paths += (ROOT / folder).rglob("*.py")
    code = "\n".join(path.read_text() for path in paths)
    missing = [
        name
        for name in set(re.findall(r"`HEADRACE_([A-Z_]+)", TEXT))
        if f"HEADRACE_{name}" not in code and f"{name.lower()}:" not in code
    ]
    assert missing == []
