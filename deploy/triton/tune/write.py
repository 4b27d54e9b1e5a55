"""Writes the folder of a model's next version with the chosen settings."""

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
# The mesh must send a backend as many concurrent requests as the engine decodes.
_N_PARALLEL = "n_parallel"
_CONCURRENCY = "max_concurrent_requests"


def require_new(folder: Path) -> None:
    """Checks that the folder does not exist or is empty.

    Raises:
        CliError: it is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CliError(f"--write must be a new folder, but {folder} is not empty")


def write_folder(
    files: Mapping[str, Path], folder: Path, *, start: Settings, chosen: Settings
) -> None:
    """Copies a version's files and puts the chosen settings into its configuration."""
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
    header = [
        f"# Measured and chosen by `headrace model tune` on {cores} cores. Comments below may",
        "# describe the previous values:",
        *changed,
    ]
    return "\n".join(header) + "\n\n" + configured(config, chosen)


def _manifest(text: str, chosen: Settings) -> str:
    manifest = json.loads(text)
    if _N_PARALLEL not in chosen or _CONCURRENCY not in manifest:
        return text
    manifest[_CONCURRENCY] = int(chosen[_N_PARALLEL])
    return json.dumps(manifest, indent=2) + "\n"
