"""Builds the clients of `tests/clients` and runs them against a mesh.

Outputs stay in `build/clients`, so that later builds are quick. Its folders are as deep as those of
the sources: paths such as `../../../protos` are right in both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.triton.artifact import bundled_version
from libs.model_reference import version_name
from tests.support.mesh import RunningMesh

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 240
TEST_SECONDS = BUILD_SECONDS + 120  # the mesh starts and the client runs, too
_RUN_SECONDS = 60
_RESUMED_AFTER = 5

# What the tools print where a registry cannot be reached, or where they are too old for a package.
_UNAVAILABLE = re.compile(
    r"dial tcp|no such host"  # go
    r"|requires go >="
    r"|Could not transfer artifact|Could not resolve artifact"  # mvn
    r"|Could not resolve host|failed to download|Unable to update registry"  # cargo
    r"|rustc \S+ is not supported"
    r"|EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT"  # npm
)


class ClientBuild:
    """The build of one client; skips the test where this machine cannot do it.

    Attributes:
        folder: the sources and the outputs.
    """

    def __init__(self, language: str, *tools: str) -> None:
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"the {language} client needs {' and '.join(missing)}")
        self._language = language
        self._deadline = time.monotonic() + BUILD_SECONDS
        self.folder = ROOT / "build" / "clients" / language
        shutil.rmtree(self.folder / "gen", ignore_errors=True)
        shutil.copytree(ROOT / "tests" / "clients" / language, self.folder, dirs_exist_ok=True)

    def run(self, *command: str, cwd: Path | None = None) -> None:
        """Runs one command of the build, in `folder` if not said otherwise."""
        try:
            status, output = _run(command, cwd or self.folder, self._deadline - time.monotonic())
        except TimeoutError:
            pytest.skip(f"the {self._language} client was not built within {BUILD_SECONDS} s")
        unavailable = _UNAVAILABLE.search(output)
        if status and unavailable:
            pytest.skip(f"the {self._language} client cannot be built here: {unavailable[0]}")
        assert status == 0, f"{' '.join(command)}\n{output}"

    def install_npm_packages(self) -> None:
        """Installs what `package.json` names."""
        self.run(
            "npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error",
            "--fetch-retries=1",
        )  # fmt: skip

    def generate(self) -> None:
        """Runs `buf generate` with the template of the language."""
        template = f"protos/clients/{self._language}.gen.yaml"
        self.run("buf", "generate", "--template", template, "-o", str(self.folder), cwd=ROOT)
        generated = [path.name for path in (self.folder / "gen").rglob("*.*")]
        assert generated
        assert not [name for name in generated if "internal" in name or "events" in name]

    def check_streams(self, mesh: RunningMesh, *command: str) -> None:
        """Runs the client: it streams an answer, resumes it, and understands an error."""
        done = subprocess.run(
            [*command, mesh.address, mesh.token()],
            cwd=self.folder, check=False, capture_output=True, text=True, timeout=_RUN_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert len(seen["deltas"]) > _RESUMED_AFTER
        assert seen["started"]["model_version"] == version_name(
            "smollm2", bundled_version("smollm2")
        )
        assert seen["started"]["request_id"]
        assert seen["started"]["request_id"] == seen["final"]["request_id"]
        assert seen["final"]["completion_tokens"] == 12
        assert seen["resumed"] == "".join(seen["deltas"][_RESUMED_AFTER:])
        assert seen["error"] == {
            "code": 5,
            "domain": "headrace",
            "reason": "MODEL_NOT_FOUND",
            "models": "minilm,smollm2",
        }


def _run(command: tuple[str, ...], cwd: Path, seconds: float) -> tuple[int, str]:
    """Returns the exit status and the output; ends all processes of the command when time is up.

    Raises:
        TimeoutError: it took longer.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError from None
    return process.returncode, output
