"""The `headrace` command."""

from __future__ import annotations

import sys

import typer

from cli import chat, cost, jobs, keys, mesh, models, providers, registry, tokens, tools
from deploy.errors import CliError

app = typer.Typer(
    help="Runs a mesh of Headrace on this machine. HEADRACE_HOME is the folder of all its state, "
    "HEADRACE_EDGE_PORT the port of its edge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    mesh.up,
    mesh.down,
    mesh.status,
    chat.demo,
    chat.chat,
    tokens.token,
    mesh.logs,
):
    app.command()(command)
app.add_typer(jobs.app, name="job")
models.app.command("ls")(registry.list_models)
app.add_typer(models.app, name="model")
app.add_typer(registry.app, name="deployment")
app.add_typer(cost.prices, name="price")
app.add_typer(cost.costs, name="cost")
app.add_typer(keys.app, name="key")
app.add_typer(providers.app, name="provider")
app.add_typer(tools.app, name="tools")


def main() -> None:
    """Runs the command line. An error that the user can fix is printed in one line."""
    try:
        app()
    except CliError as error:
        sys.exit(f"headrace: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
