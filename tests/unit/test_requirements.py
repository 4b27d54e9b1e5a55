"""The locks have what the lists of packages ask for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"


def named(file: str, pattern: str) -> set[str]:
    text = (REQUIREMENTS / file).read_text()
    return {name.lower() for name in re.findall(pattern, text, flags=re.MULTILINE)}


def test_every_package_asked_for_is_locked() -> None:
    """A lock that was not made again installs what was asked for earlier."""
    for name in ("services", "dev", "fuzz", "models", "triton", "weights"):
        asked = named(f"{name}.in", r"^([A-Za-z0-9._-]+)")
        locked = named(f"{name}.lock", r"^([A-Za-z0-9._-]+)==")
        assert asked - {"-c"} <= locked, name
