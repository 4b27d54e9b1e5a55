"""Reads and changes the settings in a model's `config.pbtxt` that can be tuned.

Values are replaced in the text, which keeps its comments. The result is then parsed with Triton's
schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from deploy.errors import CliError

QUEUE_DELAY: Final = "queue_delay_microseconds"
PREFERRED: Final = "preferred_batch_size"
INSTANCES: Final = "instances"
MAX_TRIALS = 32

Settings = Mapping[str, str]
# For each setting the values to try.
Axes = Mapping[str, tuple[str, ...]]

_DELAY_PATTERN = r"(max_queue_delay_microseconds:\s*)\d+"
_PREFERRED_PATTERN = r"\n[ \t]*preferred_batch_size:\s*\[[^\]]*\]"
_INSTANCES_PATTERN = r"(instance_group\s*\[\s*\{[^}]*?\bcount:\s*)\d+"


def default_axes(kind: str) -> Axes:
    """Returns the values that are tried by default.

    `n_batch` is at most 32: with larger prefills the rounding differs, and a resumed answer would
    differ from the one that was interrupted.
    """
    if kind == "embedding":
        return {
            INSTANCES: ("1", "2"),
            QUEUE_DELAY: ("0", "500", "2000"),
            PREFERRED: ("", "8", "16"),
        }
    cores = len(os.sched_getaffinity(0))
    threads = sorted({1, max(1, cores // 2), max(1, cores * 3 // 4), cores})
    return {
        "threads": tuple(map(str, threads)),
        "n_parallel": ("4", "8", "16"),
        "n_batch": ("8", "16", "32"),
    }


def parse_axes(given: list[str]) -> Axes:
    """Parses `name=value,value`. In `preferred_batch_size=,8,8+16` the first value is empty: none.

    Raises:
        CliError: a text has another form, or there are too many values.
    """
    axes = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not name or not equals:
            raise CliError(f"--vary must be name=value,value, but it is {text!r}")
        axes[name] = tuple(dict.fromkeys(values.split(",")))
    if sum(map(len, axes.values())) > MAX_TRIALS:
        raise CliError(f"--vary must have at most {MAX_TRIALS} values in total")
    return axes


def current(config: str, names: Iterable[str]) -> Settings:
    """Returns the values of these settings in a configuration.

    Raises:
        CliError: it has no such setting, or it is invalid.
    """
    parsed = parse(config)
    return {name: _value(parsed, name) for name in names}


def configured(config: str, settings: Settings) -> str:
    """Returns the configuration with these values.

    Raises:
        CliError: it has no such setting, or the value is invalid.
    """
    for name, value in settings.items():
        config = _edited(config, name, value)
    found = current(config, settings)
    for name, value in settings.items():
        if found[name] != value:
            raise CliError(f"{name} cannot be set to {value!r} in config.pbtxt")
    return config


def parse(config: str) -> model_config_pb2.ModelConfig:
    """Parses a configuration with Triton's schema.

    Raises:
        CliError: it is invalid.
    """
    try:
        return text_format.Parse(config, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise CliError(f"config.pbtxt: {error}") from error


def _value(parsed: model_config_pb2.ModelConfig, name: str) -> str:
    if name == INSTANCES and len(parsed.instance_group) == 1:
        return str(parsed.instance_group[0].count)
    if name in (QUEUE_DELAY, PREFERRED) and parsed.HasField("dynamic_batching"):
        batching = parsed.dynamic_batching
        if name == QUEUE_DELAY:
            return str(batching.max_queue_delay_microseconds)
        return "+".join(map(str, batching.preferred_batch_size))
    if name in parsed.parameters:
        return str(parsed.parameters[name].string_value)
    raise CliError(f"config.pbtxt has no setting {name}")


def _edited(config: str, name: str, value: str) -> str:
    if name == PREFERRED:
        bare = re.sub(_PREFERRED_PATTERN, "", config)
        line = f"\n  preferred_batch_size: [ {value.replace('+', ', ')} ]" if value else ""
        return re.sub(r"(dynamic_batching\s*\{)", rf"\g<1>{line}", bare, count=1)
    if name in (QUEUE_DELAY, INSTANCES):
        pattern = _DELAY_PATTERN if name == QUEUE_DELAY else _INSTANCES_PATTERN
        return re.sub(pattern, rf"\g<1>{value}", config, count=1) if value.isdecimal() else config
    pattern = rf'(key:\s*"{re.escape(name)}"\s+value\s*\{{\s*string_value:\s*)"[^"]*"'
    return re.sub(pattern, lambda found: f'{found[1]}"{value}"', config, count=1)
