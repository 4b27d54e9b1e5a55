"""The `headrace` command."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from cli import chat, cost, demo, jobs, keys, mesh, models, providers, registry, tokens, tools
from deploy.errors import CliError

# Errors of the system that the user can fix, and that name a file. Others are bugs of Headrace.
_FIXABLE = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
        errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip

app = typer.Typer(
    help="Runs a mesh of Headrace on this machine. HEADRACE_HOME is the folder of all its state, "
    "HEADRACE_EDGE_PORT the port of its edge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Has the options that are not of one command."""


for command in (
    mesh.up,
    mesh.down,
    mesh.status,
    demo.demo,
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
    except OSError as error:
        if error.filename is None or error.errno not in _FIXABLE:
            raise
        sys.exit(f"headrace: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
