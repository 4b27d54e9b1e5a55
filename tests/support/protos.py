"""All methods of the protos of Headrace."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor

GENERATED = Path(__file__).parents[2] / "libs" / "gen"


def all_methods() -> Iterator[MethodDescriptor]:
    """Yields each method of each service of each proto, public or internal."""
    for path in sorted((GENERATED / "headrace").rglob("*_pb2.py")):
        name = ".".join(path.relative_to(GENERATED).with_suffix("").parts)
        for service in importlib.import_module(name).DESCRIPTOR.services_by_name.values():
            yield from service.methods


def path_of(method: MethodDescriptor) -> str:
    """Returns `/package.Service/Method`."""
    return f"/{method.containing_service.full_name}/{method.name}"
