"""Fuzzes one target, guided by the coverage of its code: `python -m tests.fuzz.guided TARGET …`.

The remaining arguments are libFuzzer's: folders of inputs, then options.
"""

from __future__ import annotations

import sys

import atheris

# Before the targets import them.
with atheris.instrument_imports(include=["libs", "services"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main(arguments: list[str]) -> None:
    """Runs until libFuzzer ends the process."""
    target = TARGETS[arguments[1]]

    def run(data: bytes) -> None:
        target(data)

    atheris.enabled_hooks.add("str")
    atheris.Setup([arguments[0], *arguments[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
