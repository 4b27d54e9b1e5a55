"""One answer of a real model, and everything that the mesh knows of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import grpc
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2
from rich.console import Console

from cli.answer import Answer, dollars, stream_answer
from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.edge_client import TENANT, USER, EdgeClient, describe
from deploy.local.layout import Layout
from libs.chat.wire import text_message

MODEL = "smollm2"
PROMPT = "Why is the sky blue? Answer in three sentences."
MAX_TOKENS = 160
LEDGER_SECONDS = 10.0


def show_demo(layout: Layout, *, prompt: str) -> None:
    """Streams an answer, shows its facts, checks its cost with the ledger, says what to try next.

    Raises:
        CannotRun: a call failed.
    """
    console = Console()
    question = prompt or PROMPT
    request = inference_pb2.GenerateRequest(
        model=MODEL,
        messages=[text_message(inference_pb2.ROLE_USER, question)],
        max_tokens=MAX_TOKENS,
    )
    with EdgeClient(layout) as edge:
        _show(console, f"\n{question}\n", style="bold")
        try:
            answer = stream_answer(edge, request, console)
            booked = _booked(edge, answer.final.request_id)
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error
        console.print()
        for name, value in _facts(answer, booked):
            _show(console, f"{name:<12} {value}")
        _show(console, "\nTry next", style="bold")
        for title, text in _next_steps(edge.address):
            _show(console, f"\n# {title}", style="dim")
            _show(console, text)


def _show(console: Console, text: str, *, style: str = "") -> None:
    """Prints text as it is and unwrapped, to be copied."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _booked(edge: EdgeClient, request_id: str) -> cost_pb2.GetRequestCostResponse:
    """Asks the ledger, which a loaded machine may keep waiting for the event."""
    stub = cost_pb2_grpc.CostServiceStub(edge.channel)
    request = cost_pb2.GetRequestCostRequest(request_id=request_id)
    deadline = time.monotonic() + LEDGER_SECONDS
    while True:
        try:
            return stub.GetRequestCost(request, metadata=edge.metadata, timeout=LEDGER_SECONDS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
                raise


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


def _next_steps(edge_address: str) -> list[tuple[str, str]]:
    headrace, grpcurl, python = (_command(name) for name in ("headrace", "grpcurl", "python"))
    token = f"$({headrace} token --tenant {TENANT} --user {USER})"
    question = "Name three rivers."
    messages = f'[{{"role": "user", "content": "{question}"}}]'
    grpc_messages = f'[{{"role": "ROLE_USER", "parts": [{{"text": "{question}"}}]}}]'
    grpc_line = (
        f'{grpcurl} -plaintext -H "authorization: Bearer {token}" '
        f'-d \'{{"model": "{MODEL}", "messages": {grpc_messages}}}\' '
        f"{edge_address} headrace.inference.v1.InferenceService/Generate"
    )
    http_line = (
        f'curl -N http://{edge_address}/v1/chat/completions -H "authorization: Bearer {token}" '
        "-H 'content-type: application/json' "
        f'-d \'{{"model": "{MODEL}", "stream": true, "messages": {messages}}}\''
    )
    openai_lines = (
        f"{python} - <<EOF\n"
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="http://{edge_address}/v1", api_key="{token}")\n'
        f"messages = {messages}\n"
        f'for chunk in client.chat.completions.create(model="{MODEL}", stream=True, '
        "messages=messages):\n"
        '    print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
        "EOF"
    )
    return [
        ("gRPC, with no protos at hand", grpc_line),
        ("OpenAI's HTTP API, as server-sent events", http_line),
        ("the unmodified openai client", openai_lines),
    ]


def _command(name: str) -> str:
    """Returns how to call a command of ours from the current folder, for this mesh."""
    path = REPOSITORY / ".venv" / "bin" / name
    shown = path.relative_to(REPOSITORY) if Path.cwd() == REPOSITORY else path
    home = os.environ.get("HEADRACE_HOME")
    return f"HEADRACE_HOME={home} {shown}" if home and name == "headrace" else str(shown)
