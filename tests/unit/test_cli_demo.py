"""The commands that `headrace demo` prints can be pasted into a shell."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jwt
import pytest

from cli.demo import _command, _next_steps
from deploy import keys
from deploy.local.edge_record import LocalEdge
from tests.support.certificates import Authority


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


@pytest.mark.parametrize("tls", [False, True])
def test_the_printed_commands_are_valid_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
):
    """Quotes are balanced, whatever the path of the mesh is, with TLS and without."""
    home = tmp_path / "ann's mesh"
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    edge = LocalEdge(address="127.0.0.1:8080")
    if tls:
        home.mkdir()
        certificate, _ = Authority(tmp_path).issue(names=("edge.example",))
        (home / "certificate.pem").write_bytes(certificate)
        edge = replace(edge, certificate_file=str(home / "certificate.pem"))

    texts = [text for _, text in _next_steps(edge)]

    assert all(("https://edge.example:8080" in text) == tls for text in texts[1:])
    for text in texts:
        subprocess.run(["sh", "-n", "-c", text], check=True, timeout=60)
