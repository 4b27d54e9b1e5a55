"""Compiles and runs the mock provider, which is written in C."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("mock_provider.c")
CHUNKS = 64


class CompilerMissing(Exception):  # noqa: N818  # says what is the matter
    """There is no C compiler; a mock in Python would be the bottleneck."""


@contextmanager
def mock_provider(folder: Path) -> Iterator[int]:
    """Runs the mock and yields its port.

    Raises:
        CompilerMissing: `gcc` is not installed.
    """
    if shutil.which("gcc") is None:
        raise CompilerMissing("gcc is not installed: install it to compile the mock provider")
    binary = folder / "mock_provider"
    subprocess.run(["gcc", "-O2", "-o", str(binary), str(SOURCE)], check=True)
    with subprocess.Popen(
        [str(binary), "0"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split()[1])
        finally:
            process.terminate()
