"""`headrace demo`: one answer, what is known about it, and commands to try next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from cli.options import DEFAULT_TENANT, DEFAULT_USER, dollars, layout
from deploy.errors import CliError
from deploy.host import REPOSITORY

if TYPE_CHECKING:  # `headrace token` must not import them
    from headrace.cost.v1 import cost_pb2
    from rich.console import Console

    from deploy.client.answers import Answer
    from deploy.local.edge_record import LocalEdge

MODEL = "smollm2"
PROMPT = "Why is the sky blue? Answer in three sentences."
DEMO_MAX_TOKENS = 160


def demo(
    prompt: Annotated[str, typer.Option(help="The question.")] = PROMPT,
) -> None:
    """Stream a real model's answer through the edge and show its version, tokens and cost."""
    import grpc
    from headrace.inference.v1 import inference_pb2
    from rich.console import Console

    from deploy.client.answers import booked_cost, stream_answer
    from deploy.client.edge import describe
    from deploy.local.edge import connect
    from deploy.local.edge_record import local_edge
    from libs.chat.wire import text_message

    console = Console()
    if not prompt.strip():
        raise CliError("--prompt must have text")
    request = inference_pb2.GenerateRequest(
        model=MODEL,
        messages=[text_message(inference_pb2.ROLE_USER, prompt)],
        max_tokens=DEMO_MAX_TOKENS,
    )
    mesh = layout()
    with connect(mesh, tenant=DEFAULT_TENANT, user=DEFAULT_USER, scopes="infer read") as edge:
        _show(console, f"\n{prompt}\n", style="bold")
        try:
            answer = stream_answer(edge, request, lambda text: _show(console, text, end=""))
            booked = booked_cost(edge, answer.final.request_id)
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error
    _show(console, "\n")
    for name, value in _facts(answer, booked):
        _show(console, f"{name:<12} {value}")
    _show(console, "\nTry next", style="bold")
    for title, text in _next_steps(local_edge(mesh)):
        _show(console, f"\n# {title}", style="dim")
        _show(console, text)


def _show(console: Console, text: str, *, style: str = "", end: str = "\n") -> None:
    """Prints text unchanged: without markup and added line breaks, so that it can be copied."""
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def _facts(answer: Answer, booked: cost_pb2.GetRequestCostResponse) -> list[tuple[str, str]]:
    final = answer.final
    usage = final.usage
    matches = booked.cost_nano_usd == final.cost_nano_usd
    ledger = "the ledger says the same" if matches else f"LEDGER: {dollars(booked.cost_nano_usd)}"
    tokens = (
        f"{usage.prompt_tokens} prompt, {usage.completion_tokens} completion, "
        f"{usage.cached_tokens} cached"
    )
    return [
        ("version", final.model_version),
        ("artifact", final.artifact_digest),
        ("tokens", tokens),
        ("cost", f"{dollars(final.cost_nano_usd)} ({ledger})"),
        ("first token", f"{answer.first_token_seconds * 1000:.0f} ms"),
        ("speed", f"{answer.tokens_per_second:.1f} tokens/s"),
        ("route", f"{final.route.deployment}: {final.route.reason}"),
        ("request id", final.request_id),
        ("trace id", final.trace_id),
    ]


def _next_steps(edge: LocalEdge) -> list[tuple[str, str]]:
    options = _tls_options(edge)
    headrace, grpcurl, python = (_command(name) for name in ("headrace", "grpcurl", "python"))
    token = f"$({headrace} token --tenant {DEFAULT_TENANT} --user {DEFAULT_USER})"
    question = "Name three rivers."
    messages = f'[{{"role": "user", "content": "{question}"}}]'
    grpc_messages = f'[{{"role": "ROLE_USER", "parts": [{{"text": "{question}"}}]}}]'
    grpc_line = (
        f'{grpcurl} {options.grpcurl} -H "authorization: Bearer {token}" '
        f'-d \'{{"model": "{MODEL}", "messages": {grpc_messages}}}\' '
        f"{edge.address} headrace.inference.v1.InferenceService/Generate"
    )
    http_line = (
        f"curl -N {options.curl}{options.url}/v1/chat/completions "
        f'-H "authorization: Bearer {token}" '
        "-H 'content-type: application/json' "
        f'-d \'{{"model": "{MODEL}", "stream": true, "messages": {messages}}}\''
    )
    openai_lines = (
        f"{python} - <<EOF\n"
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{options.url}/v1", api_key="{token}")\n'
        f"messages = {messages}\n"
        f'for chunk in client.chat.completions.create(model="{MODEL}", stream=True, '
        "messages=messages):\n"
        '    print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
        "EOF"
    )
    return [
        ("gRPC, by reflection", grpc_line),
        ("OpenAI's HTTP API, as server-sent events", http_line),
        ("the unmodified openai client", openai_lines),
    ]


class _TlsOptions(NamedTuple):
    """How each program calls an edge, with TLS or without.

    Attributes:
        url: of the edge, by the name in its certificate.
        curl: options, with a space at the end if there are any.
        grpcurl: options.
    """

    url: str
    curl: str
    grpcurl: str


def _tls_options(edge: LocalEdge) -> _TlsOptions:
    """Returns options that work on this machine, whatever its DNS and its authorities are."""
    from deploy.client.edge import server_name

    if not edge.certificate_file:
        return _TlsOptions(edge.url, "", "-plaintext")
    name = server_name(Path(edge.certificate_file).read_text())
    host, _, port = edge.address.rpartition(":")
    file = shlex.quote(edge.certificate_file)
    return _TlsOptions(
        f"https://{name}:{port}",
        f"--cacert {file} --connect-to ::{host}:{port} ",
        f"-cacert {file} -authority {name}",
    )


def _command(name: str) -> str:
    """Returns how a shell in the current folder runs a program of the environment."""
    path = REPOSITORY / ".venv" / "bin" / name
    shown = shlex.quote(str(path.relative_to(REPOSITORY) if Path.cwd() == REPOSITORY else path))
    home = os.environ.get("HEADRACE_HOME")
    return f"HEADRACE_HOME={shlex.quote(home)} {shown}" if home and name == "headrace" else shown
