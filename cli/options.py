"""What several commands have: options, the mesh that is meant, and a console for tables."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.errors import CliError
from deploy.local.layout import Layout

if TYPE_CHECKING:  # `headrace token` must not import it
    from rich.console import Console

DEFAULT_TENANT = "acme"
DEFAULT_USER = "ann"
# Of tables that are not on a terminal: wide enough for every value, so that none is cut.
_PIPE_COLUMNS = 1000
_NANO_USD_PER_USD = 1_000_000_000

Tenant = Annotated[str, typer.Option(help="The tenant that pays.")]
User = Annotated[str, typer.Option(help="The user that calls.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def layout() -> Layout:
    """Returns the mesh that the environment selects.

    Raises:
        CliError: a variable is invalid.
    """
    return Layout.of(os.environ)


def started_layout() -> Layout:
    """Returns the mesh that the environment selects, if one was ever started there.

    Raises:
        CliError: none was, or a variable is invalid.
    """
    from deploy import keys

    found = layout()
    if not keys.jwks_path(found.home).exists():
        raise CliError(f"no mesh was started in {found.home}; `headrace up` starts one")
    return found


def console() -> Console:
    """Returns a console for tables. In a pipe or a file, no value is cut to fit a terminal."""
    from rich.console import Console

    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fixed else _PIPE_COLUMNS)


def dollars(nano_usd: int) -> str:
    """Returns an amount in dollars, exact to the nano-dollar."""
    units, nanos = divmod(nano_usd, _NANO_USD_PER_USD)
    return f"${units}.{nanos:09}"
