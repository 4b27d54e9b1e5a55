"""A Triton for tuning, independent of any mesh on this machine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploy import keys
from deploy.errors import CliError
from deploy.host import LOOPBACK, REPOSITORY, free_ports
from deploy.triton.command import CONTROL_HEADER, remove_shared_memory
from deploy.triton.run import STOP_SECONDS

BACKEND_ID = "tune"
START_SECONDS = 60.0
LOAD_SECONDS = 120.0
UNLOAD_SECONDS = 30.0
# Triton's parent kills it after STOP_SECONDS, which it checks twice a second.
_STOP_SECONDS = STOP_SECONDS + 2.0
_POLL_SECONDS = 0.05


class TuningTriton:
    """One Triton. Load one candidate at a time into it."""

    def __init__(self, process: subprocess.Popen[bytes], *, address: str, home: Path) -> None:
        self.address = address
        self._process = process
        self._repository = home / "triton" / BACKEND_ID / "models"
        control_key = keys.triton_control_key_path(home).read_text()
        self._metadata = ((CONTROL_HEADER, control_key),)

    @contextlib.contextmanager
    def loaded(self, name: str, files: Mapping[str, Path], config: str) -> Iterator[None]:
        """Loads a model, and unloads it at the end.

        Args:
            name: a name that was not used before: Triton keeps overridden settings of a name.
            files: the files of the model's folder, by their paths in it.
            config: the text of its `config.pbtxt`.

        Raises:
            CliError: Triton cannot load it; the message says why.
        """
        folder = self._repository / name
        for inside, source in files.items():
            link = folder / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            if inside == "config.pbtxt":
                link.write_text(config)
            else:
                link.symlink_to(source)
        load = service_pb2.RepositoryModelLoadRequest(model_name=name)
        self._call("RepositoryModelLoad", load, LOAD_SECONDS)
        try:
            yield
        finally:
            self._unload(name)

    def cpu_seconds(self) -> float:
        """Returns the CPU time of Triton and of its running models."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _unload(self, name: str) -> None:
        """Unloads and waits for the model's processes, which would slow down the next candidate."""
        self._call(
            "RepositoryModelUnload",
            service_pb2.RepositoryModelUnloadRequest(model_name=name),
            UNLOAD_SECONDS,
        )
        deadline = time.monotonic() + UNLOAD_SECONDS
        while any(f"/{name}/" in " ".join(_command_line(each)) for each in self._family()):
            if time.monotonic() > deadline:
                raise CliError(f"the process of {name} does not end after {UNLOAD_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _call(self, method: str, request: object, seconds: float) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                getattr(stub, method)(request, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                raise CliError(f"Triton: {error.details()}") from error


@contextlib.contextmanager
def tuning_triton(log: Path) -> Iterator[TuningTriton]:
    """Runs a Triton with a temporary folder.

    Call it in the main thread: the process is killed when the thread that started it ends.

    Raises:
        CliError: it does not start.
    """
    [metrics_port] = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="headrace-tune-") as temporary:
        home = Path(temporary)
        argv = [sys.executable, "-m", "deploy.triton.run", "--backend-id", BACKEND_ID]
        address = f"unix:{home / 'socket' / 'grpc'}:1"
        argv += ["--home", temporary, "--grpc-address", address]
        argv += ["--metrics-address", f"{LOOPBACK}:{metrics_port}"]
        argv += ["--control-key-file", str(keys.ensure_triton_control_key(home))]
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603  # this Python
                argv, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            _wait_ready(process, address=address, log=log)
            yield TuningTriton(process, address=address, home=home)
        finally:
            _stop(process)
            remove_shared_memory(home=home, backend_id=BACKEND_ID)


def _wait_ready(process: subprocess.Popen[bytes], *, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(grpc.RpcError):
                if stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1).ready:
                    return
            time.sleep(_POLL_SECONDS)
    raise CliError(f"Triton does not start; its log is {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # then the kernel kills Triton
        process.wait()


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
