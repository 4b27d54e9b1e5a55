"""Values are set in a model's configuration, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.errors import CliError
from deploy.triton.tune.settings import configured, current, default_axes, parse, parse_axes
from deploy.triton.tune.write import require_new, write_folder

MODELS = Path(__file__).parents[2] / "deploy" / "triton" / "models"
MINILM = (MODELS / "minilm" / "config.pbtxt").read_text()
SMOLLM2 = (MODELS / "smollm2" / "config.pbtxt").read_text()


@pytest.mark.parametrize(("model", "kind"), [("minilm", "embedding"), ("smollm2", "chat")])
def test_every_value_that_is_tried_can_be_set(model, kind):
    """Triton's own schema reads the new value back."""
    config = (MODELS / model / "config.pbtxt").read_text()
    for name, values in default_axes(kind).items():
        for value in values:
            assert current(configured(config, {name: value}), [name]) == {name: value}


def test_only_the_setting_changes():
    """Everything else stays as it was, comments included."""
    tuned = configured(SMOLLM2, {"threads": "7"})
    expected = parse(SMOLLM2)
    expected.parameters["threads"].string_value = "7"
    assert parse(tuned) == expected
    assert len(tuned.splitlines()) == len(SMOLLM2.splitlines())


def test_preferred_sizes_are_added_replaced_and_removed():
    """Removing them gives the original text again."""
    one = configured(MINILM, {"preferred_batch_size": "8+16"})
    assert list(parse(one).dynamic_batching.preferred_batch_size) == [8, 16]
    other = configured(one, {"preferred_batch_size": "4"})
    assert list(parse(other).dynamic_batching.preferred_batch_size) == [4]
    assert configured(other, {"preferred_batch_size": ""}) == MINILM


@pytest.mark.parametrize(
    ("name", "value"),
    [("instances", "two"), ("queue_delay_microseconds", "1.5"), ("unknown", "1")],
)
def test_an_invalid_value_is_refused(name, value):
    """The message names the setting."""
    with pytest.raises(CliError, match=name):
        configured(MINILM, {name: value})


def test_a_chat_model_has_no_dynamic_batching():
    """Its engine does the batching, so a queue delay cannot be set."""
    with pytest.raises(CliError, match="queue_delay"):
        current(SMOLLM2, ["queue_delay_microseconds"])


def test_values_to_try_are_parsed():
    """An empty value is allowed, and none is tried twice."""
    given = ["preferred_batch_size=,8", "threads=1,2,1"]
    assert parse_axes(given) == {"preferred_batch_size": ("", "8"), "threads": ("1", "2")}


@pytest.mark.parametrize("given", ["threads", "=1", "threads=" + ",".join(map(str, range(99)))])
def test_invalid_values_to_try_are_refused(given):
    """Without a name or without values, and too many."""
    with pytest.raises(CliError):
        parse_axes([given])


def test_the_next_version_takes_as_many_requests_as_its_engine_decodes_at_once(tmp_path):
    """The manifest follows `n_parallel`; everything else is copied."""
    files = {
        name: MODELS / "smollm2" / name for name in ("config.pbtxt", "headrace.json", "1/stops.py")
    }
    start = {"n_parallel": "16", "threads": "0"}
    write_folder(files, tmp_path / "next", start=start, chosen={"n_parallel": "4", "threads": "0"})
    written = (tmp_path / "next" / "config.pbtxt").read_text()
    assert "n_parallel: 4 (was 16)" in written
    assert current(written, start) == {"n_parallel": "4", "threads": "0"}
    manifest = json.loads((tmp_path / "next" / "headrace.json").read_text())
    assert manifest["max_concurrent_requests"] == 4
    assert (tmp_path / "next/1/stops.py").read_bytes() == files["1/stops.py"].read_bytes()


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    """A version's folder must be new."""
    require_new(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(CliError, match="not empty"):
        require_new(tmp_path)
