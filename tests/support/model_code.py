"""Imports code of a bundled model that needs neither Triton nor an engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

MODELS = Path(__file__).parents[2] / "deploy" / "triton" / "models"


def load_module(model: str, name: str) -> ModuleType:
    """Imports `1/<name>.py` of a model under a unique name."""
    path = MODELS / model / "1" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"headrace_{model}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    return module
