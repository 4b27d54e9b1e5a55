"""The `headrace` command, run as users run it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

ROOT = Path(__file__).parents[2]


def headrace(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a mesh's folder, from a folder that is not the repository."""
    return subprocess.run(
        [Path(sys.executable).with_name("headrace"), *arguments],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HEADRACE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_token_prints_a_token_and_nothing_else(tmp_path: Path):
    """It stands in other command lines: one line, with the claims that were asked for."""
    done = headrace(tmp_path, "token", "--tenant", "acme", "--user", "ann", "--scopes", "infer")

    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    claims = jwt.decode(done.stdout.strip(), options={"verify_signature": False})
    assert (claims["tenant"], claims["sub"], claims["scopes"]) == ("acme", "ann", "infer")


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["token", "--ttl", "0"], {}, "headrace: the time to live must be from 1"),
        (["token", "--tenant", "a b"], {}, "headrace: tenant 'a b': must be"),
        (["demo"], {}, "headrace: no mesh was started in"),
        (["chat"], {}, "headrace: no mesh was started in"),
        (["logs", "cost"], {}, "headrace: there is no log of cost"),
        (["up"], {"HEADRACE_EDGE_PORT": "http"}, "headrace: HEADRACE_EDGE_PORT must be a port"),
        (["up"], {"OTEL_EXPORTER_OTLP_ENDPOINT": "x"}, "headrace: OTEL_EXPORTER_OTLP_ENDPOINT is"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], line: str
):
    """No traceback: what is wrong, and an exit status that scripts see."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"HEADRACE_EDGE_PORT": str(free.getsockname()[1])}

    done = headrace(tmp_path, *arguments, **{**port, **environment})

    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_taken_edge_port_keeps_the_mesh_from_starting(tmp_path: Path):
    """Before any process is started."""
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        port = str(thief.getsockname()[1])

        done = headrace(tmp_path, "up", HEADRACE_EDGE_PORT=port)

    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
    assert not (tmp_path / "run" / "supervisord.pid").exists()


def test_down_where_nothing_runs_is_fine(tmp_path: Path):
    """It can be called at any time."""
    done = headrace(tmp_path, "down")

    assert (done.returncode, done.stdout) == (0, "not running\n")


def test_status_tells_scripts_that_nothing_runs(tmp_path: Path):
    """By its exit status."""
    assert headrace(tmp_path, "status").returncode == 1
