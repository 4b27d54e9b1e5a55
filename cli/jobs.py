"""`headrace job submit`, `ls`, `show`, `watch`, `cancel` and `delete`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_TENANT, DEFAULT_USER, Json, Tenant, User, console, layout
from deploy.errors import CliError

if TYPE_CHECKING:  # `headrace token` must not import them
    from google.protobuf.timestamp_pb2 import Timestamp
    from headrace.jobs.v1 import jobs_pb2
    from rich.table import Table

    from deploy.client.jobs import JobClient

MODEL = "smollm2"

Job = Annotated[str, typer.Argument(help="The id of the job, or jobs/ID.")]

app = typer.Typer(help="Run requests in the background.", no_args_is_help=True)


@app.command()
def submit(  # noqa: PLR0917  # typer makes options of them
    prompt: Annotated[str, typer.Argument(help="The message to answer.")] = "",
    model: Annotated[
        str, typer.Option(help="A model's name, or one version of it: smollm2@1.0.0.")
    ] = MODEL,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy, up to 2.")] = 0.0,
    payload: Annotated[
        typer.FileText | None,
        typer.Option(
            help="Instead of a prompt: a file with a JobPayload in JSON, - for standard input."
        ),
    ] = None,
    job_id: Annotated[
        str, typer.Option("--id", help="The id of the job, a UUID.", show_default="a new one")
    ] = "",
    tenant: Tenant = DEFAULT_TENANT,
    user: User = DEFAULT_USER,
    as_json: Json = False,
) -> None:
    """Submit a job and print its name."""
    from deploy.client.jobs import generation, payload_of_json

    if (payload is None) == (not prompt):
        raise CliError("give either a prompt or --payload")
    if payload is not None:
        work = payload_of_json(payload.read())
    else:
        work = generation(prompt, model=model, max_tokens=max_tokens, temperature=temperature)
    with _client(tenant, user) as client:
        job = client.submit(work, job_id=job_id)
    print(json.dumps(_dict(job), indent=2) if as_json else job.name)


@app.command("ls")
def list_jobs(
    state: Annotated[
        str,
        typer.Option(
            help="Only jobs in this state: queued, running, succeeded, failed or cancelled.",
            show_default="all",
        ),
    ] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many jobs at most.", min=1)] = 50,
    tenant: Tenant = DEFAULT_TENANT,
    user: User = DEFAULT_USER,
    as_json: Json = False,
) -> None:
    """List the jobs of a tenant, the newest first."""
    from deploy.client.jobs import STATES

    if state and state not in STATES:
        raise CliError(f"unknown state {state!r}; use one of {', '.join(STATES)}")
    with _client(tenant, user) as client:
        found = client.list(state=state, limit=limit)
    if as_json:
        print(json.dumps([_dict(job) for job in found], indent=2))
    else:
        console().print(_table(found))


@app.command()
def show(
    job: Job, tenant: Tenant = DEFAULT_TENANT, user: User = DEFAULT_USER, as_json: Json = False
) -> None:
    """Show a job and, if it has one, its answer."""
    from deploy.client.jobs import job_name

    with _client(tenant, user) as client:
        found = client.get(job_name(job))
    if as_json:
        print(json.dumps(_dict(found), indent=2))
    else:
        _print_job(found)


@app.command()
def watch(
    job: Job, tenant: Tenant = DEFAULT_TENANT, user: User = DEFAULT_USER, as_json: Json = False
) -> None:
    """Print each change of a job until it has ended. Fails unless it succeeded.

    With --json, each change is one line, the last one with the result.
    """
    from deploy.client.jobs import has_ended, job_name, state_of

    name = job_name(job)
    state = ""
    with _client(tenant, user) as client:
        for change in client.watch(name):
            state = state_of(change)
            if not as_json:
                print(f"{state} (attempts: {change.attempt_count})", flush=True)
            elif not has_ended(change):
                print(json.dumps(_dict(change)), flush=True)
        ended = client.get(name)
    if as_json:
        print(json.dumps(_dict(ended)))
    else:
        _print_outcome(ended)
    if state != "succeeded":
        raise typer.Exit(1)


@app.command()
def cancel(
    job: Job, tenant: Tenant = DEFAULT_TENANT, user: User = DEFAULT_USER, as_json: Json = False
) -> None:
    """Cancel a job that is queued or running."""
    from deploy.client.jobs import job_name, state_of

    with _client(tenant, user) as client:
        cancelled = client.cancel(job_name(job))
    print(json.dumps(_dict(cancelled), indent=2) if as_json else state_of(cancelled))


@app.command()
def delete(
    job: Job, tenant: Tenant = DEFAULT_TENANT, user: User = DEFAULT_USER, as_json: Json = False
) -> None:
    """Delete a job with its payload and result. A job that has not ended is cancelled.

    With --json, prints the name of the deleted job.
    """
    from deploy.client.jobs import job_name

    name = job_name(job)
    with _client(tenant, user) as client:
        client.delete(name)
    print(json.dumps({"name": name}, indent=2) if as_json else f"{name} is deleted")


@contextmanager
def _client(tenant: str, user: str) -> Iterator[JobClient]:
    """Connects to the mesh; the errors of calls become errors that are printed in one line."""
    import grpc

    from deploy.client.edge import describe
    from deploy.client.jobs import JobClient
    from deploy.local.edge import connect

    try:
        with connect(layout(), tenant=tenant, user=user, scopes="infer") as edge:
            yield JobClient(edge)
    except grpc.RpcError as error:
        raise CliError(describe(error)) from error


def _dict(job: jobs_pb2.Job) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(job, preserving_proto_field_name=True)


def _table(found: Sequence[jobs_pb2.Job]) -> Table:
    from rich.table import Table

    from deploy.client.jobs import state_of

    table = Table(box=None)
    for heading in ("job", "state", "attempts", "created (UTC)"):
        table.add_column(heading, no_wrap=True)
    for job in found:
        table.add_row(
            job.name.removeprefix("jobs/"),
            state_of(job),
            str(job.attempt_count),
            job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        )
    return table


def _print_job(job: jobs_pb2.Job) -> None:
    from deploy.client.jobs import has_ended, state_of

    facts = [
        ("job", job.name),
        ("state", state_of(job)),
        ("work", job.payload.WhichOneof("work") or "unknown"),
        ("attempts", str(job.attempt_count)),
        ("created", _time(job.create_time)),
        ("changed", _time(job.update_time)),
    ]
    if job.HasField("expire_time"):
        facts.append(("expires", _time(job.expire_time)))
    for name, value in facts:
        print(f"{name:<9} {value}")
    if has_ended(job):
        _print_outcome(job)


def _print_outcome(job: jobs_pb2.Job) -> None:
    from deploy.client.jobs import answer_of

    if job.HasField("error"):
        sys.stderr.write(f"{job.error.message}\n")
    if answer := answer_of(job):
        print(answer)
    elif job.result.HasField("embed"):
        print(f"{len(job.result.embed.embeddings)} embeddings; --json prints them")


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%d %H:%M:%SZ")
