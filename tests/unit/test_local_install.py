"""The installer, in a checkout of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _install(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    local = checkout / "deploy" / "local"
    local.mkdir(parents=True)
    for name in ("install.py", "preflight.py"):
        shutil.copy(ROOT / "deploy" / "local" / name, local / name)
    shutil.copytree(ROOT / "requirements", checkout / "requirements")
    return subprocess.run(
        [sys.executable, local / "install.py", "--edge-port", "triton"],
        env={"PATH": os.environ["PATH"], "HEADRACE_EDGE_PORT": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_checkout_whose_mesh_could_not_start_is_refused_before_the_installation(tmp_path: Path):
    """A minute of downloads later, `up` would say the same."""
    done = _install(tmp_path / "my checkout")

    assert done.returncode == 1
    assert "whose path has a space" in done.stderr
    assert not list((tmp_path / "my checkout").glob(".venv*"))


def test_an_index_that_cannot_be_reached_is_one_line(tmp_path: Path):
    """Not thirty of pip, the last of which says that there is no such version."""
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}

    done = _install(tmp_path / "checkout", HEADRACE_HOME=str(tmp_path), **offline)

    assert done.returncode == 1
    assert done.stderr.startswith("headrace: cannot install triton: the package index cannot be")
    assert done.stderr.count("\n") == 1
    assert "No matching distribution" not in done.stdout
