"""What `config.pbtxt` and file names of an artifact may say, so that Triton runs no code of it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from deploy.host import REPOSITORY
from deploy.triton.tune.settings import configured
from libs.errors import InvalidArgument
from libs.model_config import (
    MAX_CONFIG_BYTES,
    ModelConfigRefusedError,
    check_config,
    check_file,
)
from services.pool_agent.archive import ArtifactRefused, unpack
from services.registry.manifest import read_manifest
from tests.support import pool, triton_server

MANIFEST = b'{"kind": "embedding", "dimensions": 4, "max_input_tokens": 8}'
PYTHON = 'backend: "python"\n'
BUNDLED = sorted(
    path
    for folder in ("deploy/triton/models", "deploy/triton/gpu", "tests/bench/models")
    for path in (REPOSITORY / folder).glob("*/config.pbtxt")
)


def parameter(key: str, value: str = "x") -> str:
    return f'{PYTHON}parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


BAD_CONFIGS = {
    "environment": parameter("EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY/e"),
    "environment, as one map of several": parameter("a") + parameter("EXECUTION_ENV_PATH")[18:],
    "environment, escaped": parameter(r"\x45XECUTION_ENV_PATH"),
    "batching library": parameter("TRITON_BATCH_STRATEGY_PATH"),
    "group's name": PYTHON + 'instance_group { name: "$(sh a)" }',
    "second group's name": PYTHON + 'instance_group [ { count: 1 }, { name: "a;b" } ]',
    "line in a name": PYTHON + r'instance_group { name: "a\n" }',
    "host policy": PYTHON + 'instance_group { host_policy: "$(sh a)" }',
    "profile": PYTHON + 'instance_group { profile: "`a`" }',
    "model's name": PYTHON + 'name: "a b"',
    "file name": PYTHON + 'default_model_filename: "$(sh a)"',
    "other file": PYTHON + 'default_model_filename: "../a/model.py"',
    "other backend": 'backend: "x"',
    "other case": 'backend: "Python"',
    "no backend": "max_batch_size: 1",
    "platform": PYTHON + 'platform: "tensorflow_graphdef"',
    "runtime": PYTHON + 'runtime: "libx.so"',
    "agent": PYTHON + 'model_repository_agents { agents { name: "checksum" } }',
    "ensemble": 'platform: "ensemble" ensemble_scheduling { step { model_name: "a" } }',
    "ensemble in Python": PYTHON + 'ensemble_scheduling { step { model_name: "a" } }',
    "operations": PYTHON + 'model_operations { op_library_filename: "a.so" }',
    "warm-up": PYTHON + 'model_warmup { name: "a" }',
    "cache": PYTHON + "response_cache { enable: true }",
    "accelerator": PYTHON
    + 'optimization { execution_accelerators { cpu_execution_accelerator { name: "a" } } }',
    "unknown field": PYTHON + "unknown: 1",
    "twice": PYTHON + PYTHON,
    "no text format": "{",
    "malformed escape": r'backend: "\x"',
    "large": PYTHON + "#" * MAX_CONFIG_BYTES,
}
BAD_FILES = [
    "triton_python_backend_stub",
    "1/Triton_Python_Backend_Stub",
    "triton_python_backend_stub/a",
    "libtriton_x.so",
    "1/libtriton_python.so",
    "LIBTRITON_PYTHON.SO.1",
    "batchstrategy.so",
    "1/libbatchstrategy.so",
]


def packed(config: bytes, *names: str) -> bytes:
    made = io.BytesIO()
    files = {"headrace.json": MANIFEST, "config.pbtxt": config, "1/model.py": b"code"}
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in (files | dict.fromkeys(names, b"x")).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def assert_refused(tar: bytes, folder: Path, text: str) -> None:
    """Both the registry and the pool agent refuse it, before anything is written."""
    path = folder / "artifact.tar"
    path.write_bytes(tar)
    with pytest.raises(InvalidArgument, match=text) as refused:
        read_manifest(io.BytesIO(tar))
    assert len(refused.value.message) < 400
    with pytest.raises(ArtifactRefused, match=text):
        unpack(path, folder / "out", limit_bytes=10_000_000)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("config", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_runs_code_is_refused(tmp_path, config):
    """Libraries, shell commands, other backends, and what cannot be read."""
    assert_refused(packed(config.encode()), tmp_path, r"config\.pbtxt")


def test_a_configuration_of_other_bytes_is_refused(tmp_path):
    """Not UTF-8."""
    assert_refused(packed(b"\xff\xfe"), tmp_path, "not UTF-8")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_triton_would_load_is_refused(tmp_path, name):
    """In any folder, and in any case."""
    assert_refused(packed(PYTHON.encode(), name), tmp_path, "Triton itself would load")
    with pytest.raises(ModelConfigRefusedError):
        check_file(PurePosixPath(name))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.parent.name)
def test_the_bundled_configurations_are_accepted(path):
    """Of all models that come with Headrace; those of tests, too."""
    check_config(path.read_bytes())


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("minilm", {"instances": "2", "queue_delay_microseconds": "500"}),
        ("minilm", {"preferred_batch_size": "8+16"}),
        ("smollm2", {"threads": "2", "n_parallel": "4", "n_batch": "32"}),
    ],
)
def test_what_tuning_writes_is_accepted(model, settings):
    """Its settings are the model's own parameters, batching and instances."""
    config = REPOSITORY / "deploy/triton/models" / model / "config.pbtxt"
    check_config(configured(config.read_text(), settings).encode())


@pytest.mark.parametrize(
    "config",
    [
        pool.CONFIG,
        triton_server._CONFIG,
        PYTHON + 'name: "a-1.0.0" instance_group { name: "a_0" host_policy: "gpu_0" }',
        PYTHON + 'platform: "" runtime: "" default_model_filename: "model.py"',
        PYTHON + "optimization { input_pinned_memory { enable: false } }",
        parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "no"),
        parameter("maxTokens"),
    ],
)
def test_harmless_configurations_are_accepted(tmp_path, config):
    """By both."""
    tar = packed(config.encode())
    (tmp_path / "artifact.tar").write_bytes(tar)
    read_manifest(io.BytesIO(tar))
    assert "config.pbtxt" in unpack(
        tmp_path / "artifact.tar", tmp_path / "out", limit_bytes=100_000
    )


def test_bundled_configurations_were_found():
    assert len(BUNDLED) >= 5
