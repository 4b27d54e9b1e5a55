"""Code of a model tries to leave its sandbox, in root's mesh and in another user's."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from deploy.triton import sandbox
from tests.support.triton_server import BACKEND_ID, RunningTriton, infer_request, running_triton

pytestmark = pytest.mark.integration

# An account that owns nothing; the mesh of a user who is not root.
OTHER_USER = 65533

# Answers each request, a list of Python expressions in JSON, with their values or errors.
PROBE = """
import ctypes, glob, json, mmap, os, resource, shutil, signal, socket, subprocess, threading
import numpy as np
import triton_python_backend_utils as pb_utils

def read(path):
    with open(path, "rb") as file:
        return file.read(64).decode("latin-1")

def write(path):
    with open(path, "w") as file:
        file.write("written by a model")
    return "written"

def connect(*address):
    family = socket.AF_INET if len(address) == 2 else socket.AF_UNIX
    with socket.socket(family) as opened:
        opened.settimeout(2)
        opened.connect(address if len(address) == 2 else address[0])
        return "connected"

def listen(port):
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", port))
        opened.listen()
        return "listening"

def connect_mptcp(port):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as opened:
        opened.settimeout(2)
        opened.connect(("127.0.0.1", port))
        return "connected"

def connect_fast(port):
    with socket.socket() as opened:
        opened.settimeout(2)
        return opened.sendto(b"x", 0x20000000, ("127.0.0.1", port))

def system(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout or "nothing"

def tried(expression):
    try:
        return [True, repr(eval(expression))[:200]]
    except BaseException as error:
        return [False, f"{type(error).__name__}: {error}"[:200]]

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)[0]
            answer = json.dumps([tried(each) for each in json.loads(text)])
            tensor = pb_utils.Tensor("text", np.array([answer.encode()], np.object_))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""


class Mesh:
    """A home with all that a mesh has, of which the Triton is real.

    Attributes:
        secrets: files that a model must not read.
        home: the folder.
        socket: a Unix socket of the mesh.
        port: a TCP port of the mesh.
    """

    def __init__(self, home: Path, triton: RunningTriton, *, port: int) -> None:
        self.home = home
        self.triton = triton
        self.port = port
        self.socket = home / "run" / "s"

    def ask(self, *expressions: str) -> list[tuple[bool, str]]:
        """Returns for each expression whether it has a value in the model, and the value."""
        request = infer_request("probe", "text", [json.dumps(expressions).encode()], [1])
        with grpc.insecure_channel(self.triton.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            answer: Any = stub.ModelInfer(request, timeout=30)
        found: list[tuple[bool, str]] = [
            (bool(succeeded), str(text))
            for succeeded, text in json.loads(answer.raw_output_contents[0][4:])
        ]
        return found


SECRETS = (
    "keys/token.pem",
    "keys/hash.key",
    "secrets/openai",
    "data/jobs.db",
    "nats/jetstream/block",
    "artifacts/sha256",
    "run/ports.json",
    "logs/inference.log",
    "triton/triton-other/models/theirs/1/model.py",
)


def write_home(home: Path) -> None:
    """Writes a mesh's files, with the modes that it gives them."""
    for name in SECRETS:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret of the mesh")
        path.chmod(0o600)
    for folder in home.iterdir():
        folder.chmod(0o700)


@contextmanager
def listening(home: Path) -> Iterator[int]:
    """Listens as services of the mesh do: at a Unix socket and a TCP port."""
    with closing(socket.socket(socket.AF_UNIX)) as one, closing(socket.socket()) as other:
        one.bind(str(home / "run" / "s"))
        other.bind(("127.0.0.1", 0))
        for each in (one, other):
            each.listen()
            threading.Thread(target=_accept, args=(each,), daemon=True).start()
        yield other.getsockname()[1]


def _accept(listener: socket.socket) -> None:
    try:
        while True:
            listener.accept()[0].close()
    except OSError:
        return


@pytest.fixture(scope="module", params=["root", "other"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """A Triton as root starts it, and as another user does, for whom Landlock is the only layer."""
    if os.geteuid() != 0:
        pytest.skip("needs root to start Triton as two users")
    if not sandbox.layers()["files"]:
        pytest.skip("this kernel has no Landlock")
    user = None if request.param == "root" else OTHER_USER

    def prepare(triton: RunningTriton) -> None:
        triton.write_model("probe", PROBE)
        if user is not None:
            for path in (triton.home, *triton.home.rglob("*")):
                os.chown(path, user, user)

    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as folder:  # short
        home = Path(folder)
        write_home(home)
        with listening(home) as port, running_triton(home, user=user, before=prepare) as triton:
            triton.load("probe")
            yield Mesh(home, triton, port=port)


def test_a_model_reads_nothing_of_the_mesh(mesh):
    """Neither keys nor data, logs, other backends' models, nor what other processes have."""
    assert mesh.ask("1 + 1") == [(True, "2")]
    paths = [str(mesh.home / name) for name in SECRETS]
    paths += ["/etc/shadow", "/root/.bashrc", f"/proc/{os.getpid()}/environ"]
    paths += [f"/proc/{os.getpid()}/mem", f"/proc/{os.getpid()}/maps"]
    found = mesh.ask(*(f"read({path!r})" for path in paths))
    assert [path for path, (succeeded, _) in zip(paths, found, strict=True) if succeeded] == []
    folders = [mesh.home, mesh.home / "keys", mesh.home / "data", "/tmp", "/root", "/var", "/home"]  # noqa: S108  # what it must not see
    found = mesh.ask(*(f"os.listdir({str(folder)!r})" for folder in folders))
    assert [text for succeeded, text in found if succeeded] == []
    command = f"system(['cat', {str(mesh.home / SECRETS[0])!r}])"
    assert mesh.ask(command) == [(True, "'nothing'")]  # programs that it starts neither


def test_a_model_writes_nothing_outside_of_its_folder(mesh):
    """Not even its own code: a version never changes."""
    own = mesh.home / "triton" / BACKEND_ID
    paths = [
        *(mesh.home / name for name in SECRETS),
        *(mesh.home / "run" / "s2", mesh.home / "new", Path("/tmp/written"), Path("/var/tmp/w")),  # noqa: S108
        own / "models" / "probe" / "1" / "model.py",
        own / "models" / "probe" / "1" / "new.py",
        own / "backends" / "python" / "stub_guard.py",
    ]
    found = mesh.ask(*(f"write({str(path)!r})" for path in paths))
    assert [path for path, (succeeded, _) in zip(paths, found, strict=True) if succeeded] == []
    assert mesh.ask(f"write({str(own / 'tmp' / 'mine')!r})") == [(True, "'written'")]
    assert mesh.ask("os.path.expanduser('~'), os.environ['TMPDIR']") == [
        (True, repr((str(own / "tmp"), str(own / "tmp"))))
    ]


def test_a_model_changes_no_modes_owners_and_times(mesh):
    """Of a mesh that is not root's, all files of the account are its own."""
    paths = [mesh.home / SECRETS[0], mesh.home / "keys", mesh.home]
    before = [(path.stat().st_mode, path.stat().st_mtime_ns) for path in paths]
    for path in map(str, paths):
        mesh.ask(f"os.chmod({path!r}, 0o777)", f"os.utime({path!r}, (1, 1))")
        expressions = [f"os.chown({path!r}, os.getuid(), os.getgid())"]
        expressions += [f"os.setxattr({path!r}, 'user.a', b'b')"]
        assert [worked for worked, _ in mesh.ask(*expressions)] == [False, False]
    assert [(path.stat().st_mode, path.stat().st_mtime_ns) for path in paths] == before


def test_a_model_reaches_no_service(mesh):
    """By no socket: the mesh's own would take it for a service."""
    own = str(mesh.home / "socket" / "grpc:1")
    expressions = [
        f"connect({str(mesh.socket)!r})",
        f"connect('127.0.0.1', {mesh.port})",
        f"connect({own!r})",
        f"connect('127.0.0.1', {mesh.triton.metrics_port})",
        f"connect_mptcp({mesh.port})",
        f"connect_fast({mesh.port})",
        "connect('1.1.1.1', 53)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_VSOCK)",
        f"listen({mesh.port + 1})",
        f"system(['bash', '-c', 'echo > /dev/tcp/127.0.0.1/{mesh.port} && echo done']).index('d')",
    ]
    found = mesh.ask(*expressions)
    assert [each for each, (worked, _) in zip(expressions, found, strict=True) if worked] == []


def test_a_model_touches_no_other_process(mesh):
    """It may signal its own Triton, which it can crash anyway."""
    triton = mesh.triton.server().pid
    expressions = [
        f"os.kill({os.getpid()}, 0)",
        f"read('/proc/{triton}/environ')",
        f"read('/proc/{triton}/mem')",
        # What it returns is -1 where the kernel refuses.
        f"1 / (ctypes.CDLL(None).ptrace(16, {triton}, 0, 0) + 1)",
        "1 / (ctypes.CDLL(None).unshare(0x10000000) + 1)",
        "1 / (ctypes.CDLL(None).syscall(425, 8, 0) + 1)",
        "os.setuid(0) if os.getuid() else 1 / 0",
        "os.chroot('/proc')",
        f"resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE)",
        f"resource.prlimit({triton}, resource.RLIMIT_NOFILE)",
    ]
    found = mesh.ask(*expressions)
    assert [each for each, (worked, _) in zip(expressions, found, strict=True) if worked] == []


def test_a_model_has_no_rights(mesh):
    """No capability but, under root's mesh, the one that opens folders; the sandbox bounds it."""
    [(_, status)] = mesh.ask(
        "[line for line in open('/proc/self/status') if 'Cap' in line or 'Priv' in line]"
    )
    [(_, ids)] = mesh.ask("os.getresuid() + os.getresgid() + tuple(os.getgroups())")
    user = (mesh.home / "triton" / BACKEND_ID / "tmp").stat().st_uid
    assert ids == repr((user,) * 6)
    assert user != 0
    assert "NoNewPrivs:\\t1" in status
    for name in ("CapPrm", "CapEff"):
        assert f"{name}:\\t000000000000000{'0' if user == OTHER_USER else '4'}" in status


def test_tensors_in_shared_memory_are_readable_by_their_triton_alone(mesh):
    """Other users of the machine see the names of the regions."""
    mesh.ask("1")
    regions = list(Path("/dev/shm").glob(f"{mesh.triton.region_prefix()}*"))  # noqa: S108
    assert regions
    assert all(stat.S_IMODE(region.stat().st_mode) & 0o077 == 0 for region in regions)


def test_threads_processes_and_pairs_of_sockets_work(mesh):
    """Libraries need them."""
    expressions = [
        "threading.Thread(target=int).start()",
        "system(['echo', 'hello'])",
        "len(socket.socketpair())",
        "shutil.copy2('/proc/version', os.environ['TMPDIR'])",
        "bool(os.sched_getaffinity(0)) and bool(read('/proc/cpuinfo'))",
        "listen(int(os.environ['HEADRACE_ENGINE_PORT']))",
    ]
    assert [worked for worked, _ in mesh.ask(*expressions)] == [True] * len(expressions)
