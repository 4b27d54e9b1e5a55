"""Printing logs while they grow and rotate."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.logs import _Followed, print_logs
from deploy.local.layout import Layout


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "cost.log").write_text("one\ntwo\nthree\n")
    (folder / "jobs.log").write_text("four\n")
    return folder / "cost.log"


def test_the_last_lines_of_one_process_are_printed(log: Path, capsys: pytest.CaptureFixture[str]):
    """As they are, so that they can be piped into other programs."""
    layout = Layout(home=log.parents[1])

    print_logs(layout, process="cost", follow=False, line_count=2)

    assert capsys.readouterr().out == "two\nthree\n"


def test_lines_of_several_processes_say_whose_they_are(
    log: Path, capsys: pytest.CaptureFixture[str]
):
    """Without a name all logs are printed."""
    layout = Layout(home=log.parents[1])

    print_logs(layout, process=None, follow=False, line_count=1)

    assert capsys.readouterr().out == "cost: three\njobs: four\n"


def test_following_prints_each_new_line_once(log: Path):
    """A line that is half written is printed when it is whole."""
    followed = _Followed(log, labelled=False)

    with log.open("a") as writing:
        writing.write("five\nsi")
        writing.flush()
        first = followed.read_new()
        writing.write("x\n")
        writing.flush()
        second = followed.read_new()

    assert (first, second, followed.read_new()) == ("five\n", "six\n", "")


def test_following_goes_on_after_a_rotation(log: Path):
    """The new file is read from its start."""
    followed = _Followed(log, labelled=False)

    log.rename(log.with_suffix(".log.1"))
    between = followed.read_new()
    log.write_text("new\n")

    assert (between, followed.read_new()) == ("", "new\n")
