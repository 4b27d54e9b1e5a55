"""`headrace up`, `down`, `status` and `logs`."""

from __future__ import annotations

import contextlib
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
    from rich.table import Table

    from deploy.client.registry import DeploymentStatus
    from deploy.local.log_lines import LogLine
    from deploy.local.status import ProcessStatus

_LEVEL_STYLES = {"debug": "dim", "warning": "yellow", "error": "bold red"}


def up(
    models: Annotated[bool, typer.Option(help="Also deploy the bundled models.")] = True,
) -> None:
    """Start the mesh, or its missing processes, and wait until it is ready."""
    from rich.console import Console

    from cli.progress import ConsoleProgress
    from deploy.local.edge_record import local_edge
    from deploy.local.lifecycle import deploy_models, start
    from deploy.triton.sandbox import warning

    mesh = layout()
    console = Console()
    try:
        with ConsoleProgress(console) as progress:
            start(mesh, progress)
            if models:
                deploy_models(mesh, progress)
    except KeyboardInterrupt:
        sys.stderr.write(
            "headrace: interrupted; `headrace up` continues, "
            "`headrace down` stops what was started\n"
        )
        raise typer.Exit(130) from None
    if missing := warning():
        console.print(missing, style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The mesh is up: {local_edge(mesh).url}", highlight=False)


def down() -> None:
    """Stop the mesh and all its processes. Its state stays."""
    from deploy.local.lifecycle import stop

    result = stop(layout())
    killed = f", {result.killed_count} of them killed" if result.killed_count else ""
    print(
        f"{result.process_count} processes ended{killed}" if result.process_count else "not running"
    )


def status(as_json: Json = False) -> None:
    """Show every process of the mesh and what is deployed. Fails unless all is ready."""
    from deploy.local.edge_record import local_edge
    from deploy.local.status import deployment_statuses, process_statuses
    from deploy.triton.sandbox import layers, warning

    mesh = layout()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mesh.socket.stat()  # fails where the folder is another user's; the mesh may run then
    processes = process_statuses(mesh)
    deployments: Sequence[DeploymentStatus] = []
    problem = "" if processes else f"not running ({mesh.home})"
    if processes:
        try:
            deployments = deployment_statuses(mesh)
        except CliError as error:
            problem = str(error)
    ready = not problem and all(process.ready for process in processes)
    if as_json:
        body = {
            "home": str(mesh.home),
            "edge": local_edge(mesh).url if processes else "",
            "ready": ready,
            "problem": problem,
            "processes": [asdict(process) for process in processes],
            "deployments": [asdict(deployment) for deployment in deployments],
            "sandbox": {**layers(), "warning": warning()},
        }
        print(json.dumps(body, indent=2))
    else:
        _print_status(mesh.home, processes, deployments, problem)
        if processes and (missing := warning()):
            print(f"\n{missing}")
        if processes:
            print(f"\nedge: {local_edge(mesh).url}")
    if not ready:
        raise typer.Exit(1)


def logs(
    process: Annotated[str | None, typer.Argument(help="One process; all by default.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue with new lines as they are written.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="How many of the latest lines.")
    ] = 50,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the lines as they were written, as JSON.")
    ] = False,
) -> None:
    """Print the logs of the processes by time, in UTC."""
    from deploy.local.log_lines import as_json as json_of
    from deploy.local.logs import read_logs

    show = _LogPrinter(with_process=process is None)
    for line in read_logs(layout(), process=process, follow=follow, line_count=lines):
        if as_json:
            print(json_of(line))
        else:
            show.line(line)
        if follow:
            sys.stdout.flush()


class _LogPrinter:
    """Prints lines for people: time, level, process, what happened, and what is known about it."""

    def __init__(self, *, with_process: bool) -> None:
        from rich.console import Console

        self._console = Console(soft_wrap=True)
        self._with_process = with_process
        self._day = ""

    def line(self, line: LogLine) -> None:
        from rich.text import Text

        if line.time is None:
            self._console.print(Text(f"{'':<13}{line.text}"))
            return
        if (day := f"{line.time:%Y-%m-%d}") != self._day:
            self._day = day
            self._console.print(Text(f"{day} (UTC)", style="dim"))
        text = Text(f"{line.time:%H:%M:%S}.{line.time.microsecond // 1000:03} ")
        text.append(f"{line.level:<8}", style=_LEVEL_STYLES.get(line.level, ""))
        if self._with_process:
            text.append(f"{line.process:<16}", style="cyan")
        text.append(line.text)
        several = [value for value in line.values.values() if "\n" in str(value)]
        for name, value in line.values.items():
            if value not in several and value not in ("", None):
                text.append(f" {name}=", style="dim")
                text.append(str(value))
        self._console.print(text)
        for value in several:  # a traceback
            self._console.print(Text(str(value)))


def _print_status(
    home: Path,
    processes: Sequence[ProcessStatus],
    deployments: Sequence[DeploymentStatus],
    problem: str,
) -> None:
    out = console()
    if processes:
        out.print(_process_table(home, processes))
    if problem:
        style = "red" if processes else ""
        out.print(problem, style=style, markup=False, highlight=False, soft_wrap=True)
    else:
        out.print()
        out.print(_deployment_table(deployments))


def _process_table(home: Path, processes: Sequence[ProcessStatus]) -> Table:
    from rich.table import Table

    table = Table("process", "ready", "version", "address", "pid", "memory", box=None)
    for process in processes:
        table.add_row(
            process.name,
            "[green]yes[/]" if process.ready else f"[red]no ({process.state})[/]",
            process.version,
            process.address.replace(f"unix:{home}/", ""),
            str(process.pid or ""),
            f"{process.memory_bytes / 2**20:.0f} MiB" if process.pid else "",
        )
    return table


def _deployment_table(deployments: Sequence[DeploymentStatus]) -> Table:
    from rich.table import Table

    table = Table("deployment", "state", "version", "backend", "its state", "artifact", box=None)
    for deployment in deployments:
        backends = [(backend.id, backend.state) for backend in deployment.backends]
        for backend, state in backends or [("(none yet)", "")]:
            table.add_row(
                deployment.name,
                deployment.state,
                deployment.model_version,
                backend,
                state,
                deployment.artifact_digest[:19],
            )
    return table
