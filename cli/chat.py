"""A conversation with a model on the terminal."""

from __future__ import annotations

import contextlib
import readline  # noqa: F401 - gives `input` line editing and a history
import sys

import grpc
from headrace.inference.v1 import inference_pb2
from rich.console import Console

from cli.answer import Answer, dollars, stream_answer
from deploy.local.edge_client import EdgeClient, describe
from deploy.local.layout import Layout
from libs.chat.wire import text_message

# Older turns are left out of the prompt, so that it does not outgrow a small model's context.
HISTORY_MESSAGES = 12


class Conversation:
    """Keeps what was said and sends it along with each new question."""

    def __init__(
        self,
        layout: Layout,
        *,
        model: str,
        tenant: str,
        user: str,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self._edge = EdgeClient(layout, tenant=tenant, user=user)
        self._console = Console(soft_wrap=True)
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[inference_pb2.Message] = []

    def run(self) -> None:
        """Answers line after line until the input ends, or `/exit`."""
        if sys.stdin.isatty():
            self._console.print(f"[dim]{self._model}; /exit or Ctrl-D ends[/]", highlight=False)
        with self._edge, contextlib.suppress(EOFError):
            while (question := input("> ").strip()) != "/exit":
                if question:
                    self._ask(question)

    def _ask(self, question: str) -> None:
        asked = [*self._messages, text_message(inference_pb2.ROLE_USER, question)]
        request = inference_pb2.GenerateRequest(
            model=self._model,
            messages=asked[-HISTORY_MESSAGES:],
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        )
        try:
            answer = stream_answer(self._edge, request, self._console)
        except grpc.RpcError as error:
            self._console.print(describe(error), style="red", markup=False, highlight=False)
            return
        said = text_message(inference_pb2.ROLE_ASSISTANT, answer.text)
        self._messages = [*asked, said]
        self._console.print(f"[dim]{_footer(answer)}[/]", highlight=False)


def _footer(answer: Answer) -> str:
    usage = answer.final.usage
    return (
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached, "
        f"{dollars(answer.final.cost_nano_usd)}, {answer.tokens_per_second:.0f} tokens/s"
    )
