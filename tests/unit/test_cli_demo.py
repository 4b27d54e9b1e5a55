"""The commands that `headrace demo` prints can be pasted into a shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import jwt
import pytest

from cli.chat import _command, _next_steps
from deploy import keys


def test_a_printed_command_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also if the path of the mesh has a space."""
    home = tmp_path / "my mesh"
    keys.ensure_keys(home)
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    command = f'echo "$({_command("headrace")} token)"'

    done = subprocess.run(
        ["sh", "-c", command],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    claims = jwt.decode(done.stdout.strip(), options={"verify_signature": False})
    assert claims["tenant"] == "acme"


def test_the_printed_commands_are_valid_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Quotes are balanced, whatever the path of the mesh is."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "ann's mesh"))

    for _, text in _next_steps("127.0.0.1:8080"):
        subprocess.run(["sh", "-n", "-c", text], check=True, timeout=60)
