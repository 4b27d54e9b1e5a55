"""`headrace chat`: a conversation with a model on the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_TENANT, DEFAULT_USER, Tenant, User, dollars, layout
from deploy.errors import CliError

if TYPE_CHECKING:  # `headrace token` must not import them
    from rich.console import Console

    from deploy.client.answers import Answer
    from deploy.client.conversation import Conversation
    from deploy.client.edge import EdgeClient

MODEL = "smollm2"
HISTORY_LINES = 500
HELP = """\
/model NAME   continue with another model; /model alone lists those that can chat
/reset        forget the conversation
/help         print this
/exit         end, like Ctrl-D
Ctrl-C stops an answer. A message that starts with / is written with two: //etc/hosts"""


def chat(  # noqa: PLR0917  # typer makes options of them
    model: Annotated[
        str, typer.Option(help="A model's name, or one version of it: smollm2@1.0.0.")
    ] = MODEL,
    tenant: Tenant = DEFAULT_TENANT,
    user: User = DEFAULT_USER,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy, up to 2.")] = 0.7,
    history: Annotated[
        bool, typer.Option(help="Keep what you type in HEADRACE_HOME/chat_history.")
    ] = True,
) -> None:
    """Talk to a model. /help lists the commands in it.

    From a pipe, each line is one message, and only the answers are printed.
    """
    from rich.console import Console

    from deploy.client.conversation import Conversation, check_chat_model
    from deploy.local.edge import connect

    mesh = layout()
    with connect(mesh, tenant=tenant, user=user, scopes="infer read") as edge:
        check_chat_model(edge, model)
        conversation = Conversation(
            edge, model=model, max_tokens=max_tokens, temperature=temperature
        )
        if not sys.stdin.isatty():
            _answer_lines(conversation)
            return
        session = _Session(Console(soft_wrap=True), edge, conversation)
        with _line_editing(mesh.home / "chat_history" if history else None):
            session.run()


class _Session:
    """Reads lines from the terminal until the user ends it."""

    def __init__(self, console: Console, edge: EdgeClient, conversation: Conversation) -> None:
        self._console = console
        self._edge = edge
        self._conversation = conversation

    def run(self) -> None:
        self._note(f"{self._conversation.model}; /help lists commands, /exit or Ctrl-D ends")
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:  # drops the line, as shells do
                print()
                continue
            except EOFError:
                print()
                return
            if line == "/exit":
                return
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)

    def _ask(self, question: str) -> None:
        import grpc

        from deploy.client.edge import describe

        try:
            answer = self._conversation.ask(question, self._text)
        except grpc.RpcError as error:
            self._text("\n")
            self._problem(describe(error))
        except KeyboardInterrupt:
            self._note("\nstopped; the tokens until here are billed")
        else:
            self._note(f"\n{_footer(answer)}")

    def _command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/help":
            self._note(HELP)
        elif command == "/reset":
            self._conversation.reset()
            self._note("the conversation is empty")
        elif command == "/model":
            try:
                self._switch_model(argument.strip())
            except CliError as error:
                self._problem(str(error))
        else:
            self._problem(f"unknown command {command}; /help lists them")

    def _switch_model(self, model: str) -> None:
        from deploy.client.conversation import chat_models, check_chat_model

        if model:
            check_chat_model(self._edge, model)
            self._conversation.model = model
            self._note(f"the model is now {model}")
        else:
            self._note(
                f"the model is {self._conversation.model}; available: "
                f"{', '.join(chat_models(self._edge))}"
            )

    def _text(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)

    def _problem(self, text: str) -> None:
        self._console.print(text, style="red", markup=False, highlight=False)


def _answer_lines(conversation: Conversation) -> None:
    """Answers each line of a pipe. Numbers go to standard error, so that answers can be piped on.

    Raises:
        CliError: a call failed; the lines after it are not sent.
    """
    import grpc

    from deploy.client.edge import describe

    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            answer = conversation.ask(line.strip(), lambda text: print(text, end="", flush=True))
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error
        print(flush=True)
        print(_footer(answer), file=sys.stderr)


@contextmanager
def _line_editing(history: Path | None) -> Iterator[None]:
    """Gives `input` line editing, and the lines of earlier conversations on the arrow keys."""
    try:
        import readline
    except ImportError:  # a Python that was built without it
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    if history is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            with contextlib.suppress(OSError):  # a full disk must not end it with an error
                history.touch(mode=0o600)
                readline.write_history_file(history)


def _footer(answer: Answer) -> str:
    usage = answer.final.usage
    return (
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached, "
        f"{dollars(answer.final.cost_nano_usd)}, {answer.tokens_per_second:.0f} tokens/s"
    )
