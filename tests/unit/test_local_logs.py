"""Reading logs while they grow and rotate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cli.mesh import logs
from deploy.local.log_lines import parse
from deploy.local.logs import FollowedLog

_SECOND = "2026-11-27T10:00:02.500000Z"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Logs of every format, whose lines follow each other."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "cost.log").write_text(
        f'{{"rows":3,"event":"booked","service":"cost","level":"warning","time":"{_SECOND}"}}\n'
    )
    (folder / "nats.log").write_text("[6] 2026/11/27 10:00:01.185458 [INF] Starting\n")
    (folder / "envoy.log").write_text(
        "[2026-11-27 10:00:03.000][7][error][config] [source/a.cc:1] broken\n  in detail\n"
    )
    (folder / "supervisord.log").write_text("2026-11-27 10:00:00,054 CRIT as root\n")
    yield folder / "cost.log"
    monkeypatch.undo()
    time.tzset()


def test_the_lines_of_all_processes_are_printed_by_time(
    log: Path, capsys: pytest.CaptureFixture[str]
):
    """In one format, whoever wrote them; a line without a time stays below the one before."""
    logs(process=None, follow=False, lines=9)

    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "2026-11-27 (UTC)",
        "10:00:00.054 error   supervisord     as root",
        "10:00:01.185 info    nats            Starting",
        "10:00:02.500 warning cost            booked rows=3",
        "10:00:03.000 error   envoy           [config] [source/a.cc:1] broken",
        "               in detail",
    ]


def test_only_the_latest_lines_are_printed(log: Path, capsys: pytest.CaptureFixture[str]):
    """Of all logs together, as a reader expects of the end of a log."""
    logs(process=None, follow=False, lines=3, as_json=True)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == log.read_text().strip()  # as it was written
    assert [json.loads(line)["event"] for line in lines] == [
        "booked", "[config] [source/a.cc:1] broken", "  in detail",
    ]  # fmt: skip


def test_no_line_can_be_asked_for(log: Path, capsys: pytest.CaptureFixture[str]):
    """To follow only what is new."""
    logs(process="cost", follow=False, lines=0)

    assert capsys.readouterr().out == ""


def test_a_line_of_triton_has_no_year(tmp_path: Path):
    """It is the latest that fits."""
    raw = 'W1231 23:59:59.083856 6660 memory.cc:273] "no"'

    line = parse("triton-0", raw, now=datetime(2027, 1, 1, tzinfo=UTC))

    assert line.time == datetime(2026, 12, 31, 23, 59, 59, 83856, tzinfo=UTC)
    assert (line.level, line.text) == ("warning", 'memory.cc:273] "no"')


def test_a_line_that_is_not_a_record_is_printed_as_it_is():
    """Whatever a program writes."""
    for raw in ("{", '{"time": 3}', "[1]", "{}", '{"event": "x"}', "Traceback (most recent call)"):
        assert parse("cost", raw, now=datetime.now(UTC)).text == raw


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
