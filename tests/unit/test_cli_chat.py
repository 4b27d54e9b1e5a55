"""`headrace chat` as users run it, on a terminal and in a pipe, with a scripted service."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

HEADRACE = Path(sys.executable).with_name("headrace")
CTRL_C = "\x03"
CTRL_D = "\x04"
UP = "\x1b[A"


class _Service(
    inference_pb2_grpc.InferenceServiceServicer,
    router_pb2_grpc.RouterServiceServicer,
    registry_pb2_grpc.RegistryServiceServicer,
):
    """Answers `one two`; the question `long` is answered with `one` until the caller stops it."""

    def __init__(self) -> None:
        self.questions: list[list[str]] = []
        self.models: list[str] = []
        self.stopped = threading.Event()

    def Generate(self, request, context):
        self.questions.append([message.parts[0].text for message in request.messages])
        self.models.append(request.model)
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="one ", token_count=1))
        if self.questions[-1][-1] == "long":
            context.add_callback(self.stopped.set)
            self.stopped.wait(timeout=20)
            return
        if self.questions[-1][-1] == "fail":
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="two", token_count=1))
        yield inference_pb2.GenerateResponse(final=inference_pb2.Final(request_id="r"))

    def Route(self, request, context):
        kinds = {
            "smollm2": model_pb2.MODEL_KIND_CHAT,
            "other": model_pb2.MODEL_KIND_CHAT,
            "minilm": model_pb2.MODEL_KIND_EMBEDDING,
        }
        if request.model not in kinds:
            status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="no such model")
            info = error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND", domain="headrace")
            info.metadata["models"] = ",".join(kinds)
            status.details.add().Pack(info)
            context.abort_with_status(rpc_status.to_status(status))
        schema = model_pb2.ModelSchema(kind=kinds[request.model])
        return router_pb2.RouteResponse(schema=schema)

    def ListDeployments(self, request, context):
        names = ("minilm", "other", "smollm2")
        return registry_pb2.ListDeploymentsResponse(
            deployments=[
                registry_pb2.Deployment(
                    name=f"deployments/{name}",
                    spec=registry_pb2.DeploymentSpec(model_version=f"models/{name}/versions/1.0.0"),
                )
                for name in names
            ]
        )


@pytest.fixture(autouse=True)
def interrupts_are_not_ignored() -> Iterator[None]:
    """Children inherit that a signal is ignored, as it is in background jobs of scripts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def service() -> _Service:
    return _Service()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED


@pytest.fixture
def home(service: _Service, tmp_path: Path) -> Iterator[Path]:
    """The folder of a mesh whose edge is the scripted service."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    router_pb2_grpc.add_RouterServiceServicer_to_server(service, server)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "edge.json").write_text(f'{{"address": "127.0.0.1:{port}"}}')
    yield tmp_path
    server.stop(None).wait()


class _Terminal:
    """`headrace chat` on a terminal."""

    def __init__(self, home: Path, *options: str) -> None:
        self._file, self._child = os.openpty()
        # The leader of a new session gets the first terminal that it opens: Ctrl-C works there.
        self._process = subprocess.Popen(
            ["sh", "-c", 'tty=$1; shift; exec "$@" <"$tty" >"$tty" 2>&1', "sh",
             os.ttyname(self._child), HEADRACE, "chat", *options],
            env={"PATH": os.environ["PATH"], "HEADRACE_HOME": str(home), "TERM": "dumb"},
            start_new_session=True,
        )  # fmt: skip
        self.output = ""

    def wait_for(self, text: str) -> str:
        """Returns what was printed since the last call, up to this text, when it is there."""
        deadline = time.monotonic() + 20
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            if select.select([self._file], [], [], 0.1)[0]:
                self.output += os.read(self._file, 4096).decode()
        seen, _, self.output = self.output.partition(text)
        return seen

    def ask(self, line: str, reply: str) -> str:
        """Types a line at the prompt and returns what was printed before this reply."""
        self.wait_for("> ")
        self.type(f"{line}\n")
        return self.wait_for(reply)

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def end(self, keys: str = CTRL_D) -> int:
        """Ends the conversation and returns the exit status."""
        self.wait_for("> ")
        self.type(keys)
        try:
            return self._process.wait(timeout=20)
        finally:
            self._process.kill()
            os.close(self._file)
            os.close(self._child)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(home: Path, service: _Service):
    """What arrived stays in the conversation, and the mesh stops at once."""
    terminal = _Terminal(home)
    terminal.ask("long", "one ")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped")
    assert service.stopped.wait(timeout=5)

    terminal.ask("next", "two")

    assert terminal.end() == 0
    assert service.questions[-1] == ["long", "one ", "next"]


def test_ctrl_c_at_the_prompt_drops_the_line(home: Path, service: _Service):
    """As in shells: it does not end the conversation."""
    terminal = _Terminal(home)
    terminal.wait_for("> ")
    terminal.type("never sent")
    terminal.wait_for("never sent")
    time.sleep(0.5)  # Python handles a signal only while it waits for a key
    terminal.type(CTRL_C)
    terminal.ask("sent", "two")

    assert terminal.end() == 0
    assert service.questions == [["sent"]]


def test_commands_are_not_sent_to_the_model(home: Path, service: _Service):
    """Unknown ones neither: nobody pays for a typo."""
    terminal = _Terminal(home)
    assert "/reset" in terminal.ask("/help", "Ctrl-C stops")
    terminal.ask("/hepl", "unknown command /hepl; /help lists them")
    terminal.ask("first", "two")
    terminal.ask("/reset", "the conversation is empty")
    terminal.ask("//etc/hosts", "two")

    assert terminal.end("/exit\n") == 0
    assert service.questions == [["first"], ["/etc/hosts"]]


def test_the_model_can_be_changed(home: Path, service: _Service):
    """To one that exists and can chat; the conversation goes on."""
    terminal = _Terminal(home)
    terminal.ask("/model", "the model is smollm2; available: other, smollm2")
    terminal.ask("/model nope", "no such model; available: smollm2,other,minilm (MODEL_NOT_FOUND)")
    terminal.ask("/model minilm", "minilm cannot chat; models that can: other, smollm2")
    terminal.ask("/model other", "the model is now other")
    terminal.ask("hello", "two")

    assert terminal.end() == 0
    assert service.models == ["other"]


def test_lines_of_earlier_conversations_are_on_the_arrow_keys(home: Path, service: _Service):
    """In a file that only its owner can read; `--no-history` writes none."""
    for options, line in [(["--no-history"], "unseen"), ([], "seen"), ([], UP)]:
        terminal = _Terminal(home, *options)
        terminal.ask(line, "two")
        assert terminal.end() == 0

    assert [asked[-1] for asked in service.questions] == ["unseen", "seen", "seen"]
    history = home / "chat_history"
    assert "unseen" not in history.read_text().splitlines()
    assert history.stat().st_mode & 0o777 == 0o600


def _piped(home: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, "chat", *options],
        env={"PATH": os.environ["PATH"], "HEADRACE_HOME": str(home)},
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_pipe_gets_the_answers_and_nothing_else(home: Path):
    """Prompts and numbers would be read as answers."""
    done = _piped(home, "a\n\nb\n")

    assert (done.returncode, done.stdout) == (0, "one two\none two\n")
    assert done.stderr.count("tokens/s") == 2


def test_a_failed_call_in_a_pipe_is_an_error(home: Path, service: _Service):
    """Scripts see it by the exit status; later lines are not sent."""
    done = _piped(home, "fail\nb\n")

    assert done.returncode == 1
    assert done.stderr == "headrace: INTERNAL: broken\n"
    assert len(service.questions) == 1


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("nope", "NOT_FOUND: no such model; available: smollm2,other,minilm (MODEL_NOT_FOUND)"),
        ("minilm", "minilm cannot chat; models that can: other, smollm2"),
    ],
)
def test_a_wrong_model_is_refused_before_the_first_question(home: Path, model: str, problem: str):
    """Not when the user has written one."""
    done = _piped(home, "", "--model", model)

    assert (done.returncode, done.stderr) == (1, f"headrace: {problem}\n")


def test_a_mesh_that_is_down_is_named(home: Path):
    """Instead of what gRPC says about addresses."""
    (home / "run" / "edge.json").write_text('{"address": "127.0.0.1:9"}')

    done = _piped(home, "a\n")

    assert done.returncode == 1
    assert done.stderr == (
        "headrace: UNAVAILABLE: nothing answers at 127.0.0.1:9; `headrace status` shows what runs,"
        " `headrace up` starts it\n"
    )
