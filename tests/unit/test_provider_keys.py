"""`headrace provider key`: keys are written for `inference` to read, and never shown."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from deploy.errors import CliError
from deploy.provider_keys import ProviderKey, add, listed, remove
from libs.clock import SystemClock
from libs.http_client import Url
from services.inference.backends.openai_http.api_keys import ApiKeys

KEY = "sk-canary-1"
PREFIX = "https://api.openai.com/v1"


async def test_inference_reads_what_the_command_writes(tmp_path: Path):
    """With the line end that a file has; only its owner can read it."""
    added = add(tmp_path, "openai", url_prefix="https://API.OpenAI.com:443/v1/", key=f"{KEY}\n")
    assert added == ProviderKey(name="openai", url_prefix=PREFIX)
    assert listed(tmp_path) == [added]
    keys = ApiKeys(tmp_path / "secrets", clock=SystemClock())
    assert await keys.get("openai", Url.parse(f"{PREFIX}/chat")) == KEY
    path = tmp_path / "secrets" / "openai"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]
    add(tmp_path, "openai", url_prefix=PREFIX, key="sk-2")
    assert (
        await ApiKeys(tmp_path / "secrets", clock=SystemClock()).get("openai", Url.parse(PREFIX))
        == "sk-2"
    )
    remove(tmp_path, "openai")
    assert listed(tmp_path) == []


def test_a_key_of_an_earlier_version_is_added_again_from_its_own_file(tmp_path: Path):
    """It is shown as one without a URL prefix until then."""
    path = tmp_path / "secrets" / "openai"
    path.parent.mkdir()
    path.write_text(KEY)
    (problem,) = listed(tmp_path)
    assert problem.problem.startswith("has no URL prefix")
    arguments = ["provider", "key", "add", "openai", "--url-prefix", PREFIX, "--file", str(path)]
    environment = {"HEADRACE_HOME": str(tmp_path)}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["provider", "key", "ls", "--json"], env=environment)
    assert json.loads(done.output) == [{"name": "openai", "url_prefix": PREFIX, "problem": ""}]
    assert KEY not in done.output


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "../keys/edge.pem"}, "the name"),
        ({"name": ""}, "the name"),
        ({"url_prefix": "api.openai.com"}, "must start with https"),
        ({"url_prefix": "https://a@b"}, "has a user"),
        ({"key": ""}, "must be one line"),
        ({"key": "sk 1"}, "must be one line"),
        ({"key": "sk-1\nx: y"}, "must be one line"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, settings: dict[str, str], complaint: str):
    """With what is wrong, before anything is written."""
    arguments = {"name": "openai", "url_prefix": PREFIX, "key": KEY, **settings}
    with pytest.raises(CliError, match=complaint):
        add(tmp_path, arguments.pop("name"), **arguments)
    assert not (tmp_path / "secrets").exists()


def test_unreadable_files_are_listed_with_what_is_wrong(tmp_path: Path):
    """So that an operator finds them."""
    add(tmp_path, "open", url_prefix=PREFIX, key=KEY)
    (tmp_path / "secrets" / "open").chmod(0o644)
    (tmp_path / "secrets" / "broken").write_text("{")
    assert [(key.name, bool(key.problem)) for key in listed(tmp_path)] == [
        ("broken", True),
        ("open", True),
    ]
    with pytest.raises(CliError, match="no API key has the name 'other'"):
        remove(tmp_path, "other")
