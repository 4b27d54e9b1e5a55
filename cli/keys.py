"""`headrace key ls` and `headrace key rotate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json, console, started_layout

if TYPE_CHECKING:  # `headrace token` must not import them
    from deploy.keys import SigningKey

app = typer.Typer(help="Show and replace the keys of a mesh.", no_args_is_help=True)


@app.command("ls")
def list_keys(as_json: Json = False) -> None:
    """List the keys that tokens are verified with."""
    from deploy import keys

    _show(keys.signing_keys(started_layout().home), as_json=as_json)


@app.command("rotate")
def rotate_key(
    revoke: Annotated[
        bool,
        typer.Option(
            "--now",
            help="End all tokens of earlier keys immediately: a key may have been stolen.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Replace the key that signs tokens.

    Tokens of the old key stay valid until they expire. Nothing restarts and no call fails.
    """
    from deploy import keys
    from deploy.local.edge import introduce

    mesh = started_layout()
    found = keys.rotate(mesh.home, revoke=revoke, introduce=lambda token: introduce(mesh, token))
    _show(found, as_json=as_json)


def _show(keys: Sequence[SigningKey], *, as_json: bool) -> None:
    rows = [
        asdict(key) | {"use": "tokens", "expires": key.expires.isoformat() if key.expires else None}
        for key in keys
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None)
    for name in ("key", "use", "state", "verifies until"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["id"], row["use"], row["state"], row["expires"] or "")
    console().print(table)
