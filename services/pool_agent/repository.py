"""The model repository of one Triton server: a folder for each version.

The folder of a version appears in one step, complete and verified. It has a record of its files, so
that an agent that was killed can check later whether they are still the verified ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from services.pool_agent.archive import RECORD_NAME, file_digest, is_safe, unpack
from services.pool_agent.domain import Wanted

_INCOMING = ".incoming"


class ModelRepository:
    """All methods block on the disk: call them in a thread."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._incoming = folder / _INCOMING
        self._limit_bytes = limit_bytes

    def open(self) -> None:
        """Creates the folder, and removes what a killed agent left unfinished."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True)

    def download_path(self, wanted: Wanted) -> Path:
        """Returns the path for an artifact that is not verified yet."""
        return self._incoming / f"{wanted.backend_model}.tar"

    def install(self, wanted: Wanted, artifact: Path) -> None:
        """Makes the folder of a version from its verified artifact, and removes the artifact.

        Raises:
            ArtifactRefused: the artifact has something that it must not have.
        """
        unpacked = self._incoming / wanted.backend_model
        shutil.rmtree(unpacked, ignore_errors=True)
        try:
            digests = unpack(artifact, unpacked, limit_bytes=self._limit_bytes)
            record = {"artifact_digest": wanted.artifact_digest, "files": dict(digests)}
            (unpacked / RECORD_NAME).write_text(json.dumps(record))
            self.remove(wanted.backend_model)
            unpacked.rename(self._folder / wanted.backend_model)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
            artifact.unlink(missing_ok=True)

    def has(self, wanted: Wanted) -> bool:
        """Returns whether the folder of a version has the files that were verified, all allowed."""
        folder = self._folder / wanted.backend_model
        record = _read_record(folder / RECORD_NAME)
        if record.get("artifact_digest") != wanted.artifact_digest:
            return False
        files = record.get("files")
        if not isinstance(files, dict):
            return False
        try:
            return is_safe(folder, files) and all(
                file_digest(folder / name) == digest for name, digest in files.items()
            )
        except OSError:
            return False

    def remove(self, backend_model: str) -> None:
        """Removes the folder of a version, if there is one."""
        folder = self._folder / backend_model
        if folder.exists():
            # Moved away in one step: Triton would take a part of it for a model.
            removed = self._incoming / f"{backend_model}.removed"
            shutil.rmtree(removed, ignore_errors=True)
            folder.rename(removed)
            shutil.rmtree(removed)

    def names(self) -> frozenset[str]:
        """Returns the names on Triton of all versions that have a folder."""
        return frozenset(
            folder.name
            for folder in self._folder.iterdir()
            if folder.is_dir() and folder.name != _INCOMING
        )


def _read_record(path: Path) -> Mapping[str, object]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
