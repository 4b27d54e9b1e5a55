"""Reading logs while they grow and rotate."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.mesh import logs
from deploy.local.logs import FollowedLog


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "cost.log").write_text("one\ntwo\nthree\n")
    (folder / "jobs.log").write_text("four\n")
    return folder / "cost.log"


def test_the_last_lines_of_one_process_are_printed(log: Path, capsys: pytest.CaptureFixture[str]):
    """Unchanged, so that they can be piped into other programs."""
    logs(process="cost", follow=False, lines=2)

    assert capsys.readouterr().out == "two\nthree\n"


def test_lines_of_several_processes_start_with_the_name(
    log: Path, capsys: pytest.CaptureFixture[str]
):
    """Without a name all logs are printed."""
    logs(process=None, follow=False, lines=1)

    assert capsys.readouterr().out == "cost: three\njobs: four\n"


def test_following_prints_each_new_line_once(log: Path):
    """An incomplete line is read when it is complete."""
    followed = FollowedLog(log)

    with log.open("a") as writing:
        writing.write("five\nsi")
        writing.flush()
        first = followed.read_new()
        writing.write("x\n")
        writing.flush()
        second = followed.read_new()

    assert (first, second, followed.read_new()) == ("five\n", "six\n", "")


def test_following_continues_after_a_rotation(log: Path):
    """The new file is read from its start."""
    followed = FollowedLog(log)

    log.rename(log.with_suffix(".log.1"))
    between = followed.read_new()
    log.write_text("new\n")

    assert (between, followed.read_new()) == ("", "new\n")
