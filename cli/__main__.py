"""The `headrace` command."""
# ruff: noqa: PLC0415 - each command imports what it needs: `headrace token` stands in other command
# lines and must be quick

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.errors import CliError
from deploy.local.layout import Layout

app = typer.Typer(
    help="Runs a mesh of Headrace on this machine. HEADRACE_HOME holds all its state, "
    "HEADRACE_EDGE_PORT is the port of its edge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

model_app = typer.Typer(help="Works on models, without a mesh.", no_args_is_help=True)
app.add_typer(model_app, name="model")

Tenant = Annotated[str, typer.Option(help="Who pays.")]
User = Annotated[str, typer.Option(help="Who calls.")]
Model = Annotated[str, typer.Option(help="A model's name, or one version of it: smollm2@1.0.0.")]


@app.command()
def up(
    models: Annotated[bool, typer.Option(help="Also deploy the bundled models.")] = True,
) -> None:
    """Start the mesh, or what is missing of it, and wait until it is ready."""
    from rich.console import Console

    from cli.progress import StartProgress
    from deploy.local.bundled import deploy_bundled_models
    from deploy.local.edge_client import edge_address
    from deploy.local.lifecycle import start

    layout = _layout()
    console = Console()
    with StartProgress(console) as progress:
        start(layout, progress)
        if models:
            deploy_bundled_models(layout, progress)
    console.print(f"The mesh is up: {edge_address(layout)}", highlight=False)


@app.command()
def down() -> None:
    """Stop the mesh and every process of it. Its state stays."""
    from deploy.local.lifecycle import stop

    ended = stop(_layout())
    killed = f", {ended.killed_count} of them killed" if ended.killed_count else ""
    print(
        f"{ended.process_count} processes ended{killed}" if ended.process_count else "not running"
    )


@app.command()
def status() -> None:
    """Show every process of the mesh and what is deployed."""
    from cli.status import show_status

    if not show_status(_layout()):
        raise typer.Exit(1)


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
) -> None:
    """Stream a real model's answer through the edge and show what it was and cost."""
    from cli.demo import show_demo

    show_demo(_layout(), prompt=prompt)


@app.command()
def chat(
    model: Model = "smollm2",
    tenant: Tenant = "acme",
    user: User = "ann",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy, up to 2.")] = 0.7,
) -> None:
    """Talk to a model."""
    from cli.chat import Conversation

    Conversation(
        _layout(),
        model=model,
        tenant=tenant,
        user=user,
        max_tokens=max_tokens,
        temperature=temperature,
    ).run()


@app.command()
def token(
    tenant: Tenant = "acme",
    user: User = "ann",
    scopes: Annotated[str, typer.Option(help="Separated by spaces.")] = "infer admin",
    ttl: Annotated[int, typer.Option(help="How long it is valid, in seconds.")] = 12 * 60 * 60,
) -> None:
    """Print a token for calls through the edge."""
    from deploy.keys import mint_token

    home = _layout().home
    try:
        print(mint_token(home, tenant=tenant, user=user, scopes=scopes, ttl_seconds=ttl))
    except ValueError as error:
        raise CliError(str(error)) from error


@app.command()
def logs(
    process: Annotated[str | None, typer.Argument(help="All where none is named.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of each.")] = 20,
) -> None:
    """Print the logs of the processes."""
    from cli.logs import print_logs

    print_logs(_layout(), process=process, follow=follow, line_count=lines)


@model_app.command("tune")
def model_tune(  # noqa: PLR0917  # typer makes the options of them
    model: Annotated[str, typer.Argument(help="A bundled model: minilm or smollm2.")],
    seconds: Annotated[float, typer.Option(help="To measure each point.", min=0.2, max=60)] = 3.0,
    concurrency: Annotated[str, typer.Option(help="Clients at once.")] = "1,4,16",
    p95_ms: Annotated[
        float | None, typer.Option(help="Longest p95, of an answer or a first token.", min=0.1)
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="What to try, such as threads=1,2. Given often; else the usual."),
    ] = None,
    limit_seconds: Annotated[float, typer.Option(help="Try nothing new after this.")] = 600.0,
    write: Annotated[
        Path | None, typer.Option(help="Make the next version's folder here, as chosen.")
    ] = None,
) -> None:
    """Measure settings of a model on this machine and choose the best."""
    from deploy.triton.tune.session import Options, parse_concurrency, tune
    from deploy.triton.tune.settings import parse_axes

    options = Options(
        seconds=seconds,
        concurrency=parse_concurrency(concurrency),
        axes=parse_axes(vary or []),
        p95_ms=p95_ms,
        limit_seconds=limit_seconds,
        write=write,
    )
    if tune(_layout().home, model, options).chosen is None:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; what users can mend is said in one line."""
    try:
        app()
    except CliError as error:
        sys.exit(f"headrace: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _layout() -> Layout:
    return Layout.of(os.environ)


if __name__ == "__main__":
    main()
