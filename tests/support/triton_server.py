"""Runs a real Triton with the bundled models on free ports."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploy.host import free_ports
from deploy.keys import ensure_triton_control_key, triton_control_key_path
from deploy.triton.artifact import model_files
from deploy.triton.command import CONTROL_HEADER, region_prefix, remove_shared_memory

ROOT = Path(__file__).parents[2]
BACKEND_ID = "triton-test"
START_SECONDS = 30.0
STOP_SECONDS = 10.0

_POLL_SECONDS = 0.05
_LENGTH = struct.Struct("<I")
_CONFIG = """
backend: "python"
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


@dataclass
class RunningTriton:
    """One Triton, which a test may kill and start again.

    Attributes:
        user: the number of the user that starts it; None: the user of the tests.
    """

    home: Path
    metrics_port: int
    process: subprocess.Popen[bytes] | None = None
    user: int | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.home / "triton.log"

    @property
    def address(self) -> str:
        return f"unix:{self.home / 'socket' / 'grpc'}:1"

    @property
    def control(self) -> tuple[tuple[str, str], ...]:
        """The metadata of calls that change or list its models."""
        return ((CONTROL_HEADER, triton_control_key_path(self.home).read_text()),)

    @property
    def repository(self) -> Path:
        return self.home / "triton" / BACKEND_ID / "models"

    def argv(self) -> list[str]:
        """Returns the command line of the supervisor."""
        argv = [sys.executable, "-m", "deploy.triton.run", "--backend-id", BACKEND_ID]
        argv += ["--home", str(self.home), "--grpc-address", self.address]
        argv += ["--metrics-address", f"127.0.0.1:{self.metrics_port}"]
        return [*argv, "--control-key-file", str(triton_control_key_path(self.home))]

    def start(self) -> None:
        """Starts Triton and waits until it serves.

        Call it in the main thread: the process is killed when the thread that started it ends.
        """
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv(),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )
        self.wait_serving()

    def wait_serving(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ServerReadyRequest()
            while time.monotonic() < deadline:
                try:
                    if stub.ServerReady(request, timeout=1).ready:
                        return
                except grpc.RpcError:
                    time.sleep(_POLL_SECONDS)
        raise AssertionError(f"Triton is not ready: {self.log.read_text()[-2000:]}")

    def stubs(self) -> list[psutil.Process]:
        """Returns the processes of the models."""
        return self.server().children()

    def stub_of(self, model: str) -> psutil.Process:
        """Returns the process of a model."""
        [stub] = [stub for stub in self.stubs() if f"/{model}/" in stub.cmdline()[1]]
        return stub

    def server(self) -> psutil.Process:
        """Returns `tritonserver`, the child of the process that the supervisor runs."""
        assert self.process is not None
        [server] = psutil.Process(self.process.pid).children()
        return server

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal and waits until the process ends."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(STOP_SECONDS)

    def link_model(self, model: str, *, name: str = "", **parameters: int | str) -> None:
        """Links a bundled model into the repository, optionally with another name or parameters."""
        folder = self.repository / (name or model)
        for inside, source in model_files(model).items():
            link = folder / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
        config = (folder / "config.pbtxt").read_text()
        for key, value in parameters.items():
            pattern = rf'(key: "{key}" value {{ string_value: )"[^"]*"'
            config, count = re.subn(pattern, rf'\1"{value}"', config)
            assert count == 1, f"{model} has no parameter {key}"
        (folder / "config.pbtxt").unlink()
        (folder / "config.pbtxt").write_text(config)

    def write_model(self, model: str, code: str) -> None:
        """Writes a model into the repository."""
        version = self.repository / model / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.py").write_text(code)
        (version.parent / "config.pbtxt").write_text(_CONFIG)

    def load(self, *models: str) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for model in models:
                request = service_pb2.RepositoryModelLoadRequest(model_name=model)
                stub.RepositoryModelLoad(request, timeout=START_SECONDS, metadata=self.control)

    def unload(self, model: str) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
            stub.RepositoryModelUnload(request, metadata=self.control)

    def region_prefix(self) -> str:
        """Returns the prefix of the names of its shared memory."""
        return region_prefix(self.home / "triton" / BACKEND_ID)


@contextmanager
def running_triton(
    home: Path,
    models: Sequence[str] = (),
    *,
    user: int | None = None,
    before: Callable[[RunningTriton], None] = lambda _: None,
) -> Iterator[RunningTriton]:
    """Runs a Triton with some of the bundled models loaded.

    Args:
        home: the mesh's folder.
        models: bundled ones.
        user: the number of the user that starts it; None: the user of the tests.
        before: called before the start.
    """
    ensure_triton_control_key(home)
    triton = RunningTriton(home, free_ports(1)[0], user=user)
    for model in models:
        triton.link_model(model)
    before(triton)
    try:
        triton.start()
        triton.load(*models)
        yield triton
    finally:
        if triton.process is not None and triton.process.poll() is None:
            members = psutil.Process(triton.process.pid).children(recursive=True)
            triton.kill()
            psutil.wait_procs(members, timeout=STOP_SECONDS)
        remove_shared_memory(home=home, backend_id=BACKEND_ID)


@dataclass(frozen=True)
class Chunk:
    """One response of a chat model."""

    text: str
    token_ids: list[int]
    final: dict[str, Any] | None
    at_seconds: float


@dataclass
class Answer:
    """A complete answer, or the part that has arrived."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def final(self) -> dict[str, Any]:
        final = self.chunks[-1].final
        assert final is not None
        return final


class ModelError(Exception):
    """The error of a model, which is JSON."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error)
        self.reason = error["reason"]
        self.metadata = error["metadata"]


async def stream_chat(
    channel: grpc.aio.Channel,
    content: str,
    *,
    model: str = "smollm2",
    salt: str = "mine",
    **settings: Any,
) -> AsyncGenerator[Chunk, None]:
    """Yields the responses of a chat model as they arrive; `salt` separates prefix caches.

    Raises:
        ModelError: the model refused.
    """
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 24, **settings}
    request = infer_request(model, "request", [json.dumps(body).encode()], [1])
    if salt:
        request.parameters["cache_salt"].string_param = salt
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
    try:
        async for message in call:
            if message.error_message:
                raise _model_error(message.error_message)
            raw = message.infer_response.raw_output_contents
            ids = [token_id for (token_id,) in struct.iter_unpack("<i", raw[1])]
            final = raw[2][_LENGTH.size :]
            yield Chunk(
                raw[0][_LENGTH.size :].decode(),
                ids,
                json.loads(final) if final else None,
                time.monotonic(),
            )
    finally:
        call.cancel()


async def chat(channel: grpc.aio.Channel, content: str, **settings: Any) -> Answer:
    """Returns a complete answer of a chat model."""
    return Answer([chunk async for chunk in stream_chat(channel, content, **settings)])


def infer_request(
    model: str, name: str, values: Sequence[bytes], shape: Sequence[int]
) -> service_pb2.ModelInferRequest:
    """Returns a request for a model with one BYTES input."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=name, datatype="BYTES", shape=shape
    )
    raw = b"".join(_LENGTH.pack(len(value)) + value for value in values)
    return service_pb2.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[raw]
    )


def _model_error(message: str) -> Exception:
    try:
        return ModelError(json.loads(message[message.index("{") :]))
    except ValueError:
        return AssertionError(message)
