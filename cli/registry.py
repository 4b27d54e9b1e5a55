"""`headrace deployment ls | update | delete` and `headrace model ls`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json, console, layout
from deploy.errors import CliError

if TYPE_CHECKING:  # `headrace token` must not import them
    from deploy.client.edge import EdgeClient
    from deploy.client.registry import DeploymentStatus

Name = Annotated[str, typer.Argument(help="The id of the deployment.")]
Filter = Annotated[
    str,
    typer.Option("--filter", help="Conditions such as 'spec.pool = \"default\"', joined by AND."),
]
Etag = Annotated[str, typer.Option(help="Fail unless the deployment has this etag.")]

app = typer.Typer(help="Manage the deployments of a mesh.", no_args_is_help=True)


@app.command("ls")
def list_deployments(conditions: Filter = "", as_json: Json = False) -> None:
    """List the deployments."""
    from deploy.client.registry import Registry

    with _connect("read") as edge:
        found = Registry(edge).deployments(conditions)
    _show(found, as_json=as_json)


@app.command("update")
def update_deployment(
    name: Name,
    version: Annotated[
        str | None, typer.Option(help="Another version of the same model, such as 1.1.0.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Another pool.")] = None,
    etag: Etag = "",
    as_json: Json = False,
) -> None:
    """Change the version or the pool of a deployment."""
    from deploy.client.registry import Registry

    if version is None and pool is None:
        raise CliError("nothing to change: give --version, --pool or both")
    with _connect("read registry") as edge:
        changed = Registry(edge).update_deployment(name, version=version, pool=pool, etag=etag)
    _show([changed], as_json=as_json)


@app.command("delete")
def delete_deployment(name: Name, etag: Etag = "") -> None:
    """Delete a deployment. Its backends then unload the version."""
    from deploy.client.registry import Registry

    with _connect("registry") as edge:
        Registry(edge).delete_deployment(name, etag=etag)
    print(f"deleted {name}")


def list_models(
    conditions: Annotated[
        str, typer.Option("--filter", help="A condition such as 'name = \"models/smollm2\"'.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the models of a mesh and their versions."""
    from rich.table import Table

    from deploy.client.registry import Registry

    with _connect("read") as edge:
        models = Registry(edge).models(conditions)
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=2))
        return
    table = Table("model", "versions", "created", "description", box=None)
    for model in models:
        table.add_row(model.name, ", ".join(model.versions), model.create_time, model.description)
    console().print(table)


def _connect(scopes: str) -> EdgeClient:
    from deploy.local.edge import connect

    return connect(layout(), tenant="headrace", user="operator", scopes=scopes)


def _show(deployments: Sequence[DeploymentStatus], *, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print(json.dumps([asdict(deployment) for deployment in deployments], indent=2))
        return
    table = Table("deployment", "state", "version", "pool", "updated", "etag", box=None)
    for one in deployments:
        table.add_row(one.name, one.state, one.model_version, one.pool, one.update_time, one.etag)
    console().print(table)
