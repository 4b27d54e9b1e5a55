"""Fuzzes each target for a while: `python -m tests.fuzz [--seconds N] [TARGET …]`.

Inputs that reached new code are kept in `build/fuzz/TARGET` and are where the next run starts. What
breaks a target is written to `build/fuzz/found`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.corpus import EXAMPLES, TOKENS
from tests.fuzz.mutate import TOKENS as ANY_TOKENS
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
FOUND = FOLDER / "found"
# libFuzzer reports an input that takes longer, and one that needs more memory.
LONGEST_SECONDS = 1
MAX_MEMORY_MIB = 2048


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"unknown target {', '.join(sorted(unknown))}")
    broken = [
        name for name in options.targets or TARGETS if not _holds(name, seconds=options.seconds)
    ]
    for name in broken:
        print(f"{name} broke: see {FOUND.relative_to(ROOT)}")
    return 1 if broken else 0


def _holds(name: str, *, seconds: int) -> bool:
    """Fuzzes a target; returns whether it kept its promises."""
    corpus, tokens = FOLDER / name, FOLDER / f"{name}.dict"
    corpus.mkdir(parents=True, exist_ok=True)
    FOUND.mkdir(exist_ok=True)
    for number, example in enumerate(EXAMPLES[name]):
        (corpus / f"example-{number}").write_bytes(example)
    tokens.write_text("".join(map(_quoted, (*ANY_TOKENS, *TOKENS.get(name, ())))))
    print(f"{name}: {seconds} s", flush=True)
    command = [
        sys.executable, "-m", "tests.fuzz.guided", name, str(corpus),
        f"-max_total_time={seconds}", f"-timeout={LONGEST_SECONDS}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}", "-max_len=8192", "-seed=1",
        f"-dict={tokens}", f"-artifact_prefix={FOUND / name}-", "-print_final_stats=1",
    ]  # fmt: skip
    log = FOLDER / f"{name}.log"
    with log.open("wb") as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
    lines = log.read_text(errors="replace").splitlines()
    stats = [line for line in lines if line.startswith(("stat::number_of", "Done "))]
    print("\n".join(stats if status.returncode == 0 else lines[-30:]), flush=True)
    return status.returncode == 0


def _quoted(token: bytes) -> str:
    """Returns a line of libFuzzer's dictionaries, which have at most 64 bytes a token."""
    text = "".join(f"\\x{each:02x}" for each in token[:64])
    return f'"{text}"\n'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
