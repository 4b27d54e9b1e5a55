"""Generates the Python of the protos into a folder: `python protos/generate.py libs/gen`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).parent
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(out: Path) -> int:
    """Replaces `out` by freshly generated code and returns protoc's exit status."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    plugins = ["python", "grpc_python", "mypy", "mypy_grpc"]
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={WELL_KNOWN}",
            *(f"--{plugin}_out={out}" for plugin in plugins),
            *(str(path) for path in sorted((PROTOS / "headrace").rglob("*.proto"))),
        ],
    )
    packages = {parent for path in out.rglob("*.py") for parent in path.relative_to(out).parents}
    for package in packages - {Path()}:
        (out / package / "__init__.py").touch()
    return int(status)


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1])))
