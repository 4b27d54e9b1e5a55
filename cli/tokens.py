"""`headrace token`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.options import DEFAULT_TENANT, DEFAULT_USER, Json, Tenant, User, started_layout
from deploy.errors import CliError


def token(  # noqa: PLR0917  # typer makes options of them
    tenant: Tenant = DEFAULT_TENANT,
    user: User = DEFAULT_USER,
    # The names of `keys.SCOPES`, which would take too long to import for every other command.
    scopes: Annotated[
        str | None,
        typer.Option(
            help="Separated by spaces: infer (call models and submit jobs), read (see models, "
            "deployments, routes, prices and own costs), registry (change models and deployments), "
            "router (change routes), billing (set prices; see costs of all tenants), operator "
            "(operate the mesh).",
            show_default="infer read",
        ),
    ] = None,
    ttl: Annotated[
        int | None, typer.Option(help="Seconds until it expires.", show_default="12 hours")
    ] = None,
    max_priority: Annotated[
        int, typer.Option(help="The highest priority that its requests may ask for, 0 to 9.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Print a token for calls through the edge."""
    from deploy import keys

    home = started_layout().home  # the tokens of a new key would be valid nowhere
    scopes = keys.DEFAULT_SCOPES if scopes is None else scopes
    ttl = keys.DEFAULT_TTL_SECONDS if ttl is None else ttl
    try:
        signed = keys.mint_token(
            home,
            tenant=tenant,
            user=user,
            scopes=scopes,
            max_priority=max_priority,
            ttl_seconds=ttl,
        )
    except ValueError as error:
        raise CliError(str(error)) from error
    if as_json:  # the members of an OAuth token response, RFC 6749
        answer = {"access_token": signed, "token_type": "Bearer", "expires_in": ttl}
        print(json.dumps({**answer, "scope": " ".join(scopes.split())}))
    else:
        print(signed)
