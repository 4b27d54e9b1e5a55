"""The check of the protos against the frozen contract, in repositories of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = """\
syntax = "proto3";
package shop.v1;
message Order {
  string name = 1;
  string note = 2;
}
"""
WITHOUT_NOTE = PROTO.replace("  string note = 2;\n", "")
WITH_MORE = PROTO.replace("}\n", "  string more = 3;\n}\n")


class Repository:
    """A repository with one proto, the check and the settings of Buf."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proto = folder / "protos/shop/v1/shop.proto"

    @classmethod
    def create(cls, folder: Path) -> Repository:
        repository = cls(folder)
        repository.proto.parent.mkdir(parents=True)
        for name in ("buf.yaml", "protos/check_breaking.sh"):
            shutil.copy(ROOT / name, folder / name)
        repository.git("init", "--quiet", "--initial-branch=main")
        repository.commit(PROTO)
        return repository

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=ann", "-c", "user.email=ann@example.com")
        return subprocess.run(
            ["git", *identity, *arguments],
            cwd=self.folder, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def commit(self, proto: str) -> str:
        """Commits a state of the proto and returns the sha."""
        self.proto.write_text(proto)
        self.git("add", ".")
        self.git("commit", "--quiet", "--allow-empty", "--message=change")
        return self.git("rev-parse", "HEAD")

    def freeze(self, commit: str) -> None:
        (self.folder / "protos/baseline").write_text(f"{commit}\n")

    def check(self) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "protos/check_breaking.sh"],
            cwd=self.folder, check=False, capture_output=True, text=True,
            env={**os.environ, "PATH": path},
        )  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository")


def test_additions_pass_and_removals_fail(repository: Repository):
    repository.freeze(repository.git("rev-parse", "HEAD"))
    repository.proto.write_text(WITH_MORE)
    assert repository.check().returncode == 0
    repository.proto.write_text(WITHOUT_NOTE)
    checked = repository.check()
    assert checked.returncode == 1
    assert 'Previously present field "2" with name "note"' in checked.stdout
    assert "do not change or remove any" in checked.stderr


def test_the_last_release_goes_before_the_baseline(repository: Repository):
    repository.freeze(repository.git("rev-parse", "HEAD"))
    repository.commit(WITHOUT_NOTE)
    repository.git("tag", "nightly")
    assert repository.check().returncode == 1
    repository.git("tag", "v1.0.0")
    checked = repository.check()
    assert checked.returncode == 0
    assert "the tag v1.0.0" in checked.stdout


def test_old_commits_and_worktrees_are_compared(repository: Repository, tmp_path: Path):
    """Also beyond the depth that Buf itself fetches."""
    repository.freeze(repository.git("rev-parse", "HEAD"))
    for _ in range(60):
        repository.git("commit", "--quiet", "--allow-empty", "--message=other")
    repository.commit(WITHOUT_NOTE)
    repository.git("worktree", "add", "--quiet", "--detach", str(tmp_path / "worktree"))
    checked = Repository(tmp_path / "worktree").check()
    assert checked.returncode == 1
    assert "do not change or remove any" in checked.stderr


def test_a_missing_commit_fails_and_says_what_to_do(repository: Repository, tmp_path: Path):
    repository.freeze(repository.git("rev-parse", "HEAD"))
    repository.commit(WITH_MORE)
    repository.git(
        "clone", "--quiet", "--depth=1", f"file://{repository.folder}", str(tmp_path / "shallow")
    )
    checked = Repository(tmp_path / "shallow").check()
    assert checked.returncode == 1
    assert "git fetch --unshallow --tags" in checked.stderr

    repository.freeze("0" * 40)
    checked = repository.check()
    assert checked.returncode == 1
    assert "names a wrong commit" in checked.stderr
