"""System calls that the filter of a model's process refuses, in a process that has no Triton."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from deploy.triton import confinement

TRITON = Path(confinement.__file__).parent

PRELUDE = """
import ctypes, errno, os, resource, shutil, socket, sys
import confinement
libc = ctypes.CDLL(None, use_errno=True)

def error_of(number, *arguments):
    converted = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return ctypes.get_errno() if libc.syscall(number, *converted) < 0 else 0

confinement.drop_new_privileges()
confinement.deny_sockets_and_calls()
"""


def in_filter(code: str, *arguments: str) -> str:
    """Runs code behind the filter and returns what it prints."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    ran = subprocess.run(
        command,
        cwd=TRITON,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


pytestmark = pytest.mark.skipif(
    not confinement.seccomp_is_available(), reason="needs seccomp on x86-64"
)


def test_only_tcp_is_a_protocol():
    """Landlock does not check what MPTCP connects to."""
    code = """
for family in (socket.AF_INET, socket.AF_INET6):
    for protocol in (0, 6):
        socket.socket(family, socket.SOCK_STREAM, protocol).close()
    for protocol in (262, 256, 132):
        print(error_of(41, family, 1, protocol) == errno.EPROTONOSUPPORT)
"""
    assert in_filter(code).split() == ["True"] * 6


def test_sending_does_not_connect():
    """TCP Fast Open would connect past Landlock."""
    code = """
listener = socket.create_server(("127.0.0.1", 0))
with socket.socket() as opened:
    for send in (
        lambda: opened.sendto(b"x", 0x20000000, listener.getsockname()),
        lambda: opened.sendmsg([b"x"], [], 0x20000000, listener.getsockname()),
    ):
        try:
            print(send())
        except PermissionError:
            print("refused")
    print(error_of(307, opened.fileno(), 0, 1, 0x20000000) == errno.EPERM)
one, other = socket.socketpair()
one.sendmsg([b"hello"])
print(other.recv(9).decode())
"""
    assert in_filter(code).split() == ["refused", "refused", "True", "hello"]


def test_pairs_of_sockets_connect_to_nothing_else(tmp_path):
    """One that sends datagrams could send them to any Unix socket."""
    code = """
for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
    try:
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        one.connect(sys.argv[1])
        print("connected")
    except PermissionError:
        print("refused")
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    one.send(b"works")
    print(other.recv(9).decode())
"""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(str(tmp_path / "s"))
        found = in_filter(code, str(tmp_path / "s"))
    assert found.split() == ["refused", "refused", "works", "works"]


def test_modes_and_times_of_files_stay(tmp_path):
    """Libraries call these and go on; nothing changes."""
    file = tmp_path / "file"
    file.write_text("text")
    file.chmod(0o600)
    before = file.stat()
    code = """
path = sys.argv[1]
os.chmod(path, 0o777)
with open(path) as opened:
    os.fchmod(opened.fileno(), 0o777)
    os.utime(opened.fileno(), (1, 1))
print(error_of(268, -100, path.encode(), 0o777), error_of(452, -100, path.encode(), 0o777, 0))
os.utime(path, (1, 1))
print(error_of(132, path.encode(), 0), error_of(235, path.encode(), 0))
print(error_of(261, -100, path.encode(), 0))
shutil.copy2(path, path + ".copy")
"""
    assert in_filter(code, str(file)).split() == ["0"] * 5
    after = file.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert (tmp_path / "file.copy").read_text() == "text"


def test_owners_and_attributes_of_files_stay(tmp_path):
    """Also by calls that are newer than this Python."""
    file = tmp_path / "file"
    file.write_text("text")
    code = """
path = sys.argv[1].encode()
for number in (92, 94):
    print(error_of(number, path, os.getuid(), os.getgid()))
opened = os.open(path, os.O_RDONLY)
print(error_of(93, opened, os.getuid(), os.getgid()))
print(error_of(260, -100, path, os.getuid(), os.getgid(), 0))
print(error_of(188, path, b"user.a", b"b", 1, 0), error_of(189, path, b"user.a", b"b", 1, 0))
print(error_of(190, opened, b"user.a", b"b", 1, 0), error_of(199, opened, b"user.a"))
print(error_of(197, path, b"user.a"), error_of(198, path, b"user.a"))
for number in (463, 466, 469):
    print(error_of(number, -100, path, 0, 0, 0, 0))
"""
    assert set(in_filter(code, str(file)).split()) == {"1"}


def test_limits_of_other_processes_stay():
    """The own ones may change."""
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
try:
    resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)
except PermissionError:
    print("refused")
"""
    assert in_filter(code).split() == ["refused"]


def test_no_ring_makes_sockets():
    """io_uring would make them past the filter."""
    assert in_filter("print(error_of(425, 8, 0))").split() == ["1"]
