"""A setting that is wrong is named; its value, which may be a secret, is not shown."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
from libs.config import ServiceSettings
ServiceSettings()
"""


def test_errors_of_settings_do_not_show_values() -> None:
    """The process writes them to its log, which others may read."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"HEADRACE_DRAIN_SECONDS": "my-secret", "HEADRACE_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "drain_seconds" in done.stderr
    assert "my-secret" not in done.stderr + done.stdout
