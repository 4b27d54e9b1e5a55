"""`headrace provider key add | ls | rm`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json, console, layout
from deploy.errors import CliError

if TYPE_CHECKING:  # `headrace token` must not import them
    from deploy.provider_keys import ProviderKey

Name = Annotated[str, typer.Argument(help="The `api_key_name` of manifests.")]

app = typer.Typer(help="Manage external providers of models.", no_args_is_help=True)
keys = typer.Typer(help="Manage the API keys of providers.", no_args_is_help=True)
app.add_typer(keys, name="key")


@keys.command("add")
def add_key(
    name: Name,
    url_prefix: Annotated[
        str,
        typer.Option(
            help="The key is sent to URLs that start so, such as https://api.openai.com/v1."
        ),
    ],
    file: Annotated[
        Path | None, typer.Option(help="Where the key is.", show_default="standard input")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add an API key, or replace it. Nothing restarts."""
    from deploy import provider_keys

    try:
        key = sys.stdin.read() if file is None else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"the API key cannot be read: {error}") from error
    added = provider_keys.add(layout().home, name, url_prefix=url_prefix, key=key)
    _show([added], as_json=as_json)


@keys.command("ls")
def list_keys(as_json: Json = False) -> None:
    """List the API keys, without their secrets, and where they may be sent."""
    from deploy import provider_keys

    _show(provider_keys.listed(layout().home), as_json=as_json)


@keys.command("rm")
def remove_key(name: Name) -> None:
    """Delete an API key."""
    from deploy import provider_keys

    provider_keys.remove(layout().home, name)
    print(f"deleted {name}")


def _show(found: Sequence[ProviderKey], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(key) for key in found], indent=2))
        return
    from rich.table import Table

    table = Table("key", "for URLs that start with", "problem", box=None)
    for key in found:
        table.add_row(key.name, key.url_prefix, key.problem)
    console().print(table)
