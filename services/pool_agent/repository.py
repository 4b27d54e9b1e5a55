"""The folder that one Triton loads its models from: a folder for each version.

A version's folder appears there in one step, complete and verified. It holds a record of its files,
so that an agent that was killed can tell later whether they are still what was verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from services.pool_agent.archive import file_digest, unpack
from services.pool_agent.domain import Wanted

_RECORD = ".headrace.json"
_INCOMING = ".incoming"


class ModelRepository:
    """All methods read or write the disk: call them in a thread."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._incoming = folder / _INCOMING
        self._limit_bytes = limit_bytes

    def open(self) -> None:
        """Makes the folder and removes what an agent left that was killed at its work."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True)

    def download_path(self, wanted: Wanted) -> Path:
        """Returns where the artifact may be written before it is verified."""
        return self._incoming / f"{wanted.backend_model}.tar"

    def install(self, wanted: Wanted, artifact: Path) -> None:
        """Makes the folder of a version from its verified artifact, which is removed.

        Raises:
            ArtifactRefused: the artifact holds what it should not.
        """
        beside = self._incoming / wanted.backend_model
        shutil.rmtree(beside, ignore_errors=True)
        try:
            digests = unpack(artifact, beside, limit_bytes=self._limit_bytes)
            record = {"artifact_digest": wanted.artifact_digest, "files": dict(digests)}
            (beside / _RECORD).write_text(json.dumps(record))
            self.remove(wanted.backend_model)
            beside.rename(self._folder / wanted.backend_model)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            artifact.unlink(missing_ok=True)

    def holds(self, wanted: Wanted) -> bool:
        """Tells whether the version's folder has exactly the files that were verified."""
        folder = self._folder / wanted.backend_model
        record = _read_record(folder / _RECORD)
        if record.get("artifact_digest") != wanted.artifact_digest:
            return False
        files = record.get("files")
        if not isinstance(files, dict):
            return False
        try:
            return all(file_digest(folder / name) == digest for name, digest in files.items())
        except OSError:
            return False

    def remove(self, backend_model: str) -> None:
        """Removes the folder of a version, if there is one."""
        folder = self._folder / backend_model
        if folder.exists():
            # Out of Triton's sight in one step; a half of it would look like a model.
            gone = self._incoming / f"{backend_model}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
            shutil.rmtree(gone)

    def names(self) -> frozenset[str]:
        """Returns the versions that have a folder, by the name that Triton has for them."""
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
