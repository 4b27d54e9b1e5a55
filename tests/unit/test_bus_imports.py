"""What a process pays for importing: a dozen of them share one small machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

BUS = "libs.bus.worker, libs.bus.publisher, libs.bus.connection"
TELEMETRY = "libs.telemetry.logs, libs.telemetry.tracing, libs.telemetry.metrics"


@pytest.mark.parametrize("modules", [BUS, TELEMETRY], ids=["bus", "telemetry"])
@pytest.mark.parametrize("unwanted", ["sqlalchemy", "alembic", "aiohttp", "numpy", "pydantic"])
def test_what_only_some_need_is_not_imported(modules: str, unwanted: str) -> None:
    """Each costs a process 10 MB and more."""
    script = f"import sys, {modules}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_others_may_still_import_what_the_bus_left_out() -> None:
    """The HTTP client is there for whoever calls a provider with it."""
    script = "import libs.bus.connection, aiohttp; aiohttp.ClientTimeout()"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
