"""Options that several commands have."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from deploy.local.layout import Layout

DEFAULT_TENANT = "acme"
DEFAULT_USER = "ann"

Tenant = Annotated[str, typer.Option(help="The tenant that pays.")]
User = Annotated[str, typer.Option(help="The user that calls.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def layout() -> Layout:
    """Returns the mesh that the environment selects.

    Raises:
        CliError: a variable is invalid.
    """
    return Layout.of(os.environ)
