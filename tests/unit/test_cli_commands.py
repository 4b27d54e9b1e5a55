"""The `headrace` command, run as users run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

from deploy import keys

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
    """It is used in other command lines: one line, with the claims of its options."""
    done = headrace(tmp_path, "token", "--tenant", "acme", "--user", "ann", "--scopes", "infer")

    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    claims = jwt.decode(done.stdout.strip(), options={"verify_signature": False})
    assert (claims["tenant"], claims["sub"], claims["scopes"]) == ("acme", "ann", "infer")


def test_a_token_allows_calls_and_reads_by_default(tmp_path: Path):
    """Changing models or prices requires scopes of its own."""
    done = headrace(tmp_path, "token", "--json")

    answer = json.loads(done.stdout)
    claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
    assert claims["scopes"] == answer["scope"] == keys.DEFAULT_SCOPES == "infer read"
    assert claims["exp"] - claims["iat"] == answer["expires_in"] == keys.DEFAULT_TTL_SECONDS


def test_the_help_lists_all_scopes(tmp_path: Path):
    """And the default."""
    shown = headrace(tmp_path, "token", "--help", COLUMNS="200").stdout
    text = " ".join(shown.replace("│", " ").split())  # without the frame and its line breaks

    assert all(f"{scope} (" in text for scope in keys.SCOPES)
    assert f"[default: ({keys.DEFAULT_SCOPES})]" in text


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["token", "--ttl", "0"], {}, "headrace: the time to live must be 1 to"),
        (["token", "--tenant", "a b"], {}, "headrace: tenant 'a b' must be"),
        (
            ["token", "--scopes", "infer root"],
            {},
            "headrace: unknown scope 'root'; a scope must be",
        ),
        (["token", "--scopes", "internal"], {}, "headrace: unknown scope 'internal'"),
        (
            ["token", "--scopes", "admin"],
            {},
            "headrace: the scope 'admin' was split; it must be",
        ),
        (["demo"], {}, "headrace: no mesh was started in"),
        (["chat"], {}, "headrace: no mesh was started in"),
        (["job", "ls"], {}, "headrace: no mesh was started in"),
        (["job", "ls", "--state", "done"], {}, "headrace: unknown state 'done'; use one of"),
        (["job", "submit"], {}, "headrace: give either a prompt or --payload"),
        (["deployment", "ls"], {}, "headrace: no mesh was started in"),
        (["deployment", "update", "d"], {}, "headrace: nothing to change"),
        (["model", "ls"], {}, "headrace: no mesh was started in"),
        (["logs", "cost"], {}, "headrace: cost has no log"),
        (["up"], {"HEADRACE_EDGE_PORT": "http"}, "headrace: HEADRACE_EDGE_PORT must be a port"),
        (["up"], {"OTEL_EXPORTER_OTLP_ENDPOINT": "x"}, "headrace: OTEL_EXPORTER_OTLP_ENDPOINT is"),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], line: str
):
    """No traceback: what is wrong and what to do, and an exit status for scripts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"HEADRACE_EDGE_PORT": str(free.getsockname()[1])}

    done = headrace(tmp_path, *arguments, **{**port, **environment})

    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_taken_edge_port_keeps_the_mesh_from_starting(tmp_path: Path):
    """Before any process is started."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])

        done = headrace(tmp_path, "up", HEADRACE_EDGE_PORT=port)

    assert done.returncode == 1
    assert f"cannot listen on port {port} of 127.0.0.1" in done.stderr
    assert not (tmp_path / "run" / "supervisord.pid").exists()


def test_an_edge_for_the_network_needs_tls(tmp_path: Path):
    """The message says what to set; nothing is created or started."""
    done = headrace(tmp_path, "up", HEADRACE_EDGE_ADDRESS="0.0.0.0")  # noqa: S104 - refused

    assert done.returncode == 1
    assert "would cross the network unencrypted" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_triton_cannot_use_is_refused(tmp_path: Path):
    """At once, instead of a start that fails after minutes."""
    home = tmp_path / "my mesh"
    home.mkdir()

    done = headrace(home, "up", HEADRACE_EDGE_PORT="1")

    assert done.returncode == 1
    assert done.stderr == (
        "headrace: Triton cannot run models in a folder whose path has a space; "
        f"set HEADRACE_HOME to another one: {home}\n"
    )
    assert not list(home.iterdir())


def test_down_succeeds_when_nothing_runs(tmp_path: Path):
    """It can be called at any time."""
    done = headrace(tmp_path, "down")

    assert (done.returncode, done.stdout) == (0, "not running\n")


def test_status_fails_when_nothing_runs(tmp_path: Path):
    """Scripts see it by the exit status, and read why in the JSON."""
    assert headrace(tmp_path, "status").returncode == 1

    done = headrace(tmp_path, "status", "--json")

    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "home": str(tmp_path),
        "edge": "",
        "ready": False,
        "problem": f"not running ({tmp_path})",
        "processes": [],
        "deployments": [],
    }
