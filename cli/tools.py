"""`headrace tools`: the third-party programs that a mesh runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json

if TYPE_CHECKING:  # `headrace token` must not import them
    from collections.abc import Sequence

    from deploy.binaries import Verified

app = typer.Typer(help="Show and verify the third-party programs that a mesh runs.")
_SHOWN_DIGITS = 16

Reread = Annotated[
    bool, typer.Option(help="Read every file again, also those that have not changed.")
]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """Show the programs: version, origin, digest, and how to compare them with their releases."""
    from deploy.binaries import CACHE_FILE, Digests, binaries, verify

    _print(verify(binaries(), Digests(CACHE_FILE)), as_json=as_json, with_origin=True)


@app.command("verify")
def verify_tools(reread: Reread = True, as_json: Json = False) -> None:
    """Compare the programs with the digests in deploy/binaries.json. Fails if one differs."""
    from deploy.binaries import CACHE_FILE, WRONG, Digests, binaries, verify

    found = verify(binaries(), Digests(None if reread else CACHE_FILE))
    _print(found, as_json=as_json, with_origin=False)
    if any(each.state in WRONG for each in found):
        raise typer.Exit(1)


def _print(found: Sequence[Verified], *, as_json: bool, with_origin: bool) -> None:
    if as_json:
        print(json.dumps([_as_json(each) for each in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("program", "version", "state", "sha256", "files", "package", box=None)
    for each in found:
        first = next(iter(each.digests.values()))
        table.add_row(
            each.binary.name,
            each.binary.version if each.state != "own" else "?",
            each.state,
            first[:_SHOWN_DIGITS],
            str(len(each.digests)),
            each.binary.package if each.state != "own" else f"yours: {next(iter(each.digests))}",
        )
    console.print(table)
    for each in found if with_origin else ():
        console.print(f"\n{each.binary.name}: built by {each.binary.built_by}", highlight=False)
        console.print(f"  compare: {each.binary.compare}", markup=False, highlight=False)


def _as_json(found: Verified) -> dict[str, object]:
    binary = found.binary
    return {
        "name": binary.name,
        "version": binary.version,
        "package": binary.package,
        "built_by": binary.built_by,
        "compare": binary.compare,
        "setting": binary.setting,
        "state": found.state,
        "files": [{"path": path, "sha256": digest} for path, digest in found.digests.items()],
    }
