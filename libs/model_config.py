"""Says what the configuration of a model may have: `config.pbtxt`, at the top of an artifact.

Triton trusts what it reads there. Some settings make it load libraries of the model into itself, or
run shell commands before the model's process enters its sandbox; names of instances become part of
such a command. So only what is known to be harmless is accepted, and only the Python backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from google.protobuf import text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

CONFIG_NAME = "config.pbtxt"
MAX_CONFIG_BYTES = 256 * 1024

_MAX_QUOTED = 64
_MAX_MESSAGE = 160
_NAME = re.compile(r"[A-Za-z0-9_.-]*")
# Where a Triton looks for a model's backend, stub and batching library first.
_LOADED_FILES = ("libtriton_", "triton_python_backend_stub", "batchstrategy", "libbatchstrategy")
# Triton's own parameters have such names, and may be paths of what it loads: EXECUTION_ENV_PATH,
# TRITON_BATCH_STRATEGY_PATH.
_TRITON_PARAMETER = re.compile(r"[^a-z]*")
_HARMLESS_PARAMETERS = frozenset({"FORCE_CPU_ONLY_INPUT_TENSORS"})
# Not here: model_warmup and sequence_batching read files by paths, response_cache is shared by all
# tenants, and the steps of an ensemble are models of others.
_FIELDS = frozenset(
    {
        "name", "backend", "version_policy", "max_batch_size", "input", "output", "optimization",
        "dynamic_batching", "instance_group", "default_model_filename", "parameters",
        "model_transaction_policy",
    }
)  # fmt: skip
_OPTIMIZATION_FIELDS = frozenset(
    {
        "priority", "input_pinned_memory", "output_pinned_memory", "eager_batching",
        "gather_kernel_buffer_threshold",
    }
)  # fmt: skip


class ModelConfigRefusedError(Exception):
    """The artifact must not have this; the message says what, as in "the artifact has …"."""


def check_file(path: PurePosixPath) -> None:
    """Checks the path of a file in an artifact.

    Raises:
        ModelConfigRefusedError: Triton would load or execute such a file outside the sandbox.
    """
    for part in path.parts:
        if part.casefold().startswith(_LOADED_FILES):
            raise ModelConfigRefusedError(
                f"has {_quoted(part)}, a name of files that Triton itself would load"
            )


def read_config(size_bytes: int, read: Callable[[], bytes]) -> None:
    """Checks a configuration of a size, which is read only if it is not too large.

    Raises:
        ModelConfigRefusedError: it is too large or invalid, or has what it must not have.
    """
    if size_bytes > MAX_CONFIG_BYTES:
        raise ModelConfigRefusedError(f"has a {CONFIG_NAME} of more than {MAX_CONFIG_BYTES} bytes")
    check_config(read())


def check_config(content: bytes) -> None:
    """Checks the bytes of a `config.pbtxt`.

    Raises:
        ModelConfigRefusedError: it is invalid, or has what it must not have.
    """
    config = _parse(content)
    _check_fields(config, _FIELDS, "")
    if config.backend != "python":
        raise _refused(f'backend must be "python", not {_quoted(config.backend)}')
    if config.default_model_filename not in ("", "model.py"):
        raise _refused('default_model_filename must be "model.py"')
    _check_name("name", config.name)
    _check_fields(config.optimization, _OPTIMIZATION_FIELDS, "optimization.")
    for group in config.instance_group:
        for field in ("name", "host_policy"):
            _check_name(f"instance_group.{field}", getattr(group, field))
        for profile in group.profile:
            _check_name("instance_group.profile", profile)
    _check_parameters(config.parameters)


def _parse(content: bytes) -> model_config_pb2.ModelConfig:
    try:
        return text_format.Parse(content.decode(), model_config_pb2.ModelConfig())
    except UnicodeDecodeError as error:
        raise _refused("it is not UTF-8") from error
    # The parser lets errors of other kinds pass, such as those of malformed escapes.
    except (text_format.ParseError, ValueError, RecursionError) as error:
        raise _refused(str(error)[:_MAX_MESSAGE]) from error


def _check_fields(message: Message, allowed: frozenset[str], prefix: str) -> None:
    for field, _ in message.ListFields():
        if field.name not in allowed:
            raise _refused(f"{prefix}{field.name} is not supported")


def _check_name(field: str, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise _refused(f"{field} {_quoted(value)} may have letters, digits, '_', '.' and '-' only")


def _check_parameters(parameters: Mapping[str, object]) -> None:
    for key in parameters:
        if _TRITON_PARAMETER.fullmatch(key) and key not in _HARMLESS_PARAMETERS:
            raise _refused(
                f"the parameter {_quoted(key)} has the form of Triton's own; use lower-case letters"
            )


def _refused(description: str) -> ModelConfigRefusedError:
    return ModelConfigRefusedError(f"has an invalid {CONFIG_NAME}: {description}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}…")
