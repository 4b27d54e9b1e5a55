"""Makes the folder of a model's next version from what tuning chose."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from deploy.errors import CliError
from deploy.triton.tune.settings import Settings, configured

_CONFIG = "config.pbtxt"
_MANIFEST = "headrace.json"
# How many requests the mesh hands to a backend at once must follow what the engine decodes at once.
_N_PARALLEL = "n_parallel"
_CONCURRENCY = "max_concurrent_requests"


def require_new(folder: Path) -> None:
    """Checks that nothing would be overwritten.

    Raises:
        CannotRun: the folder has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CliError(f"--write takes a new folder, and {folder} is not empty")


def write_folder(
    files: Mapping[str, Path], folder: Path, *, start: Settings, chosen: Settings
) -> None:
    """Copies the version's files, with the chosen settings in its configuration."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == _CONFIG:
            target.write_text(_tuned(source.read_text(), start=start, chosen=chosen))
        elif name == _MANIFEST:
            target.write_text(_manifest(source.read_text(), chosen))
        else:
            shutil.copyfile(source, target)


def _tuned(config: str, *, start: Settings, chosen: Settings) -> str:
    changed = [
        f"#   {name}: {value or 'none'} (was {start[name] or 'none'})"
        for name, value in chosen.items()
        if value != start[name]
    ]
    if not changed:
        return config
    cores = len(os.sched_getaffinity(0))
    told = [
        f"# Measured and chosen by `headrace model tune` on {cores} cores. Comments below may",
        "# speak of the values before:",
        *changed,
    ]
    return "\n".join(told) + "\n\n" + configured(config, chosen)


def _manifest(text: str, chosen: Settings) -> str:
    manifest = json.loads(text)
    if _N_PARALLEL not in chosen or _CONCURRENCY not in manifest:
        return text
    manifest[_CONCURRENCY] = int(chosen[_N_PARALLEL])
    return json.dumps(manifest, indent=2) + "\n"
