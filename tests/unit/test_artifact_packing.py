"""Equal files give equal artifacts."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from deploy.host import REPOSITORY
from deploy.triton import artifact
from deploy.triton.artifact import (
    ArtifactUnavailableError,
    bundled_models,
    digest_of,
    model_files,
    write_artifact,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with small weights instead of the real ones."""
    root = tmp_path / "root"
    for model, weights in artifact._WEIGHTS.items():
        folder = root / "deploy" / "triton" / "models" / model
        (folder / "1" / "__pycache__").mkdir(parents=True)
        kind = "chat" if model == "smollm2" else "embedding"
        (folder / "headrace.json").write_text(json.dumps({"kind": kind}))
        (folder / "config.pbtxt").write_text('backend: "python"')
        (folder / "1" / "model.py").write_text("code")
        (folder / "1" / "__pycache__" / "model.pyc").write_text("compiled")
        for source in weights.values():
            path = root / ".venv-models" / "lib" / "python3.11" / "site-packages" / source
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"weights")
    return root


def test_the_digest_depends_on_names_and_bytes_only(tmp_path):
    """Not on times, modes, owners, or the order of the files."""
    digests = []
    for folder_name, order in (("here", ["b", "a"]), ("there", ["a", "b"])):
        folder = tmp_path / folder_name
        folder.mkdir()
        for name in order:
            (folder / name).write_text(f"content of {name}")
            os.utime(folder / name, (len(folder_name), len(folder_name)))
        (folder / "a").chmod(0o755 if folder_name == "here" else 0o600)
        files = {f"1/{name}": folder / name for name in order}
        digests.append(write_artifact(files, folder / "artifact.tar"))
    assert digests[0] == digests[1] == digest_of(tmp_path / "here" / "artifact.tar")


def test_another_byte_gives_another_digest(tmp_path):
    """A digest identifies the content."""
    (tmp_path / "a").write_text("one")
    first = write_artifact({"a": tmp_path / "a"}, tmp_path / "artifact.tar")
    (tmp_path / "a").write_text("two")
    assert write_artifact({"a": tmp_path / "a"}, tmp_path / "artifact.tar") != first


def test_the_artifact_has_the_folder_and_its_weights(tmp_path, root):
    """Without compiled Python files, and with neutral times, owners and modes."""
    models = {model.model: model for model in bundled_models(tmp_path, root=root)}
    assert {name: model.kind for name, model in models.items()} == {
        "minilm": "embedding",
        "smollm2": "chat",
    }
    with tarfile.open(models["smollm2"].artifact) as tar:
        assert tar.getnames() == ["1/model.py", "1/weights.gguf", "config.pbtxt", "headrace.json"]
        member = tar.getmember("1/weights.gguf")
    assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)


def test_an_unchanged_model_is_not_packed_again(tmp_path, root):
    """A change of one file makes a new artifact of that model only."""
    first = bundled_models(tmp_path, root=root)
    inodes = [model.artifact.stat().st_ino for model in first]
    again = bundled_models(tmp_path, root=root)
    assert again == first
    assert [model.artifact.stat().st_ino for model in again] == inodes
    (root / "deploy/triton/models/smollm2/1/model.py").write_text("other code")
    changed = {model.model: model.digest for model in bundled_models(tmp_path, root=root)}
    before = {model.model: model.digest for model in first}
    assert changed["minilm"] == before["minilm"]
    assert changed["smollm2"] != before["smollm2"]


def test_a_damaged_record_is_replaced(tmp_path, root):
    """The model is packed again."""
    first = bundled_models(tmp_path, root=root)
    first[0].artifact.with_suffix(".json").write_text("{")
    assert bundled_models(tmp_path, root=root) == first


def test_missing_weights_are_named(root):
    """The message says what to do."""
    path = next(root.rglob("*.gguf"))
    path.unlink()
    with pytest.raises(ArtifactUnavailableError, match=r"SmolLM2.*make install"):
        model_files("smollm2", root=root)


def test_the_bundled_models_have_what_the_registry_reads():
    """In the folders of this repository; a test of the registry checks the schema."""
    folder = Path(REPOSITORY, "deploy", "triton", "models")
    for model in artifact._WEIGHTS:
        manifest = json.loads((folder / model / "headrace.json").read_text())
        assert manifest["kind"] in ("chat", "embedding")
        assert manifest["preprocessing"]
        assert "name:" not in (folder / model / "config.pbtxt").read_text().split("input [")[0]
