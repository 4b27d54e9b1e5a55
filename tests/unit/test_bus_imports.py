"""What a process pays for its imports: a dozen of them share one small machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BUS = "libs.bus.worker, libs.bus.publisher, libs.bus.connection"
TELEMETRY = "libs.telemetry.logs, libs.telemetry.tracing, libs.telemetry.metrics"
SERVICES_LOCK = Path(__file__).parents[2] / "requirements/services.lock"
# nats-py imports it where it is installed, for WebSocket URLs, which the mesh does not use.
WEBSOCKETS = "aiohttp"


@pytest.mark.parametrize("modules", [BUS, TELEMETRY], ids=["bus", "telemetry"])
@pytest.mark.parametrize("unwanted", ["sqlalchemy", "alembic", "numpy", "pydantic"])
def test_what_only_some_need_is_not_imported(modules: str, unwanted: str) -> None:
    """Each costs a process 10 MB and more."""
    script = f"import sys, {modules}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_services_are_installed_without_what_nats_would_import_for_websockets() -> None:
    """Only the tests' environment has it: there a process pays 8 MB and 0.2 s for it."""
    packages = re.findall(r"^([a-z0-9._-]+)==", SERVICES_LOCK.read_text(), flags=re.MULTILINE)
    assert "nats-py" in packages
    assert WEBSOCKETS not in packages


def test_the_bus_works_without_it() -> None:
    """As in the environment of services."""
    script = f"import sys; sys.modules[{WEBSOCKETS!r}] = None; import {BUS}"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
