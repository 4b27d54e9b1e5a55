"""Tuning with a real Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from deploy.host import REPOSITORY
from deploy.triton.artifact import write_artifact
from deploy.triton.tune.settings import current

pytestmark = pytest.mark.integration


def test_settings_are_measured_and_the_next_version_can_be_packed(tmp_path):
    """It leaves a JSON file, a plot and a folder, prints the same JSON, and leaves no process."""
    written = tmp_path / "next"
    argv = [sys.executable, "-m", "cli", "model", "tune", "minilm"]
    argv += ["--seconds", "0.5", "--concurrency", "1,3", "--write", str(written)]
    argv += ["--vary", "queue_delay_microseconds=0,2000", "--json"]
    environment = {**os.environ, "HEADRACE_HOME": str(tmp_path / "home")}
    environment["TMPDIR"] = str(tmp_path)
    ran = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kept = tmp_path / "home" / "tune" / "minilm"
    result = json.loads((kept / "tune.json").read_text())
    assert json.loads(ran.stdout) == result
    first, second = (trial["settings"] for trial in result["trials"][:2])
    assert first == {"queue_delay_microseconds": "0"}
    assert second == {"queue_delay_microseconds": "2000"}
    for trial in result["trials"]:
        assert [point["concurrency"] for point in trial["points"]] == [1, 3]
        assert all(point["requests"] > 0 for point in trial["points"])
        assert all(point["errors"] == 0 for point in trial["points"])
    assert (kept / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert current((written / "config.pbtxt").read_text(), result["chosen"]) == result["chosen"]
    files = {str(path.relative_to(written)): path for path in written.rglob("*") if path.is_file()}
    assert "1/model.onnx" in files
    assert write_artifact(files, tmp_path / "next.tar").startswith("sha256:")
    assert not _left_behind(str(tmp_path))


def _left_behind(folder: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if folder in line]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none"], "choose one of minilm, smollm2"),
        (["minilm", "--vary", "n_parallel=1"], "n_parallel"),
        (["minilm", "--concurrency", "0"], "--concurrency"),
    ],
)
def test_an_invalid_option_is_one_line(tmp_path, given, message):
    """It is refused before anything starts."""
    ran = subprocess.run(
        [sys.executable, "-m", "cli", "model", "tune", *given],
        cwd=REPOSITORY,
        env={**os.environ, "HEADRACE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 1
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
