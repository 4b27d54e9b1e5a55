"""The `headrace` command, run as users run it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jwt
import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from deploy import keys
from deploy.triton import sandbox

ROOT = Path(__file__).parents[2]


def headrace(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a mesh's folder, from a folder that is not the repository."""
    return subprocess.run(
        [Path(sys.executable).with_name("headrace"), *arguments],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HEADRACE_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def free_port() -> str:
    """Returns a port that is free at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def keyed(tmp_path: Path) -> Path:
    """The folder of a mesh that was started once."""
    keys.ensure_keys(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [["token"], ["key", "ls"], ["key", "rotate"]])
def test_no_keys_are_made_for_a_mesh_that_does_not_exist(tmp_path: Path, arguments: list[str]):
    """Their tokens would be valid nowhere, and the typo in HEADRACE_HOME would stay unseen."""
    done = headrace(tmp_path, *arguments)

    assert done.returncode == 1
    assert done.stderr == f"headrace: no mesh was started in {tmp_path}; `headrace up` starts one\n"
    assert not list(tmp_path.iterdir())


def test_token_prints_a_token_and_nothing_else(keyed: Path):
    """It is used in other command lines: one line, with the claims of its options."""
    done = headrace(keyed, "token", "--tenant", "acme", "--user", "ann", "--scopes", "infer")

    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    claims = jwt.decode(done.stdout.strip(), options={"verify_signature": False})
    assert (claims["tenant"], claims["sub"], claims["scopes"]) == ("acme", "ann", "infer")


def test_a_token_allows_calls_and_reads_by_default(keyed: Path):
    """Changing models or prices requires scopes of its own."""
    done = headrace(keyed, "token", "--json")

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
        (["logs", "cost"], {}, "headrace: no mesh was started in"),
        (["up"], {"HEADRACE_EDGE_PORT": "http"}, "headrace: HEADRACE_EDGE_PORT must be a port"),
        (["up"], {"OTEL_EXPORTER_OTLP_ENDPOINT": "x"}, "headrace: OTEL_EXPORTER_OTLP_ENDPOINT is"),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line(
    keyed: Path, arguments: list[str], environment: dict[str, str], line: str
):
    """No traceback: what is wrong and what to do, and an exit status for scripts."""
    done = headrace(keyed, *arguments, **{"HEADRACE_EDGE_PORT": free_port(), **environment})

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
    status = json.loads(done.stdout)
    assert status.pop("sandbox").keys() == {*sandbox.layers(), "warning"}
    assert status == {
        "home": str(tmp_path),
        "edge": "",
        "ready": False,
        "problem": f"not running ({tmp_path})",
        "processes": [],
        "deployments": [],
    }


def test_the_version_is_printed(tmp_path: Path):
    """For reports of problems."""
    done = headrace(tmp_path, "--version")

    assert done.returncode == 0
    assert re.fullmatch(r"headrace \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(tmp_path: Path, shell: str):
    """With what `--show-completion` prints, or after `--install-completion`."""
    done = headrace(
        tmp_path, _HEADRACE_COMPLETE=f"complete_{shell}", COMP_WORDS="headrace st", COMP_CWORD="1",
        _TYPER_COMPLETE_ARGS="headrace st", _TYPER_COMPLETE_FISH_ACTION="get-args",
    )  # fmt: skip

    assert "status" in done.stdout


@pytest.mark.parametrize("command", ["up", "token"])
@pytest.mark.parametrize("home", ["file", "file/mesh"])
def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path: Path, command: str, home: str):
    """With the reason of the system."""
    (tmp_path / "file").touch()

    done = headrace(
        tmp_path, "up", HEADRACE_HOME=str(tmp_path / home), HEADRACE_EDGE_PORT=free_port()
    )

    assert done.returncode == 1
    assert done.stderr.startswith(f"headrace: {tmp_path}/file")
    assert done.stderr.count("\n") == 1


def test_an_interrupted_start_says_what_to_do(keyed: Path, monkeypatch: pytest.MonkeyPatch):
    """What was started runs on: it can be continued or stopped."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.local.lifecycle.start", interrupted)

    result = CliRunner(env={"HEADRACE_HOME": str(keyed)}).invoke(app, ["up"])

    assert result.exit_code == 130
    assert result.stderr == (
        "headrace: interrupted; `headrace up` continues, `headrace down` stops what was started\n"
    )
