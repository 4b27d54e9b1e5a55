"""Keeps other accounts of the machine out of the shared memory in which Triton passes tensors.

Prompts and answers are in it. Its Python backend creates regions in `/dev/shm` and then makes them
readable for all accounts, whatever the umask. This runs in the process that becomes Triton: the
umask applies, and the system call that would change a mode does nothing, in Triton and in its
models.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_UMASK = 0o077
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

# A classic BPF program over `struct seccomp_data`: the call's number is its first word, the
# architecture the second.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _SUCCEED_WITHOUT_EFFECT = 0x7FFF0000, 0x00050000  # the latter: errno 0
_X86_64, _FCHMOD = 0xC000003E, 91
_PROGRAM = (
    (_LOAD, 0, 0, 4),
    (_JUMP_IF_EQUAL, 0, 3, _X86_64),
    (_LOAD, 0, 0, 0),
    (_JUMP_IF_EQUAL, 0, 1, _FCHMOD),
    (_RETURN, 0, 0, _SUCCEED_WITHOUT_EFFECT),
    (_RETURN, 0, 0, _ALLOW),
)


def keep_memory_private() -> None:
    """Applies to this process, after an `exec`, and to those that it starts.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    os.umask(_UMASK)
    if platform.machine() != "x86_64":
        raise OSError("keeping Triton's shared memory private needs Linux on x86-64")
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _PROGRAM)
    buffer = ctypes.create_string_buffer(code, len(code))
    # `struct sock_fprog`: the number of instructions, and where they are.
    program = struct.pack("@HP", len(_PROGRAM), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    # A process that cannot gain privileges may install filters without being root.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0
    ):
        raise OSError(
            ctypes.get_errno(),
            "the kernel refuses the seccomp filter that keeps prompts in shared memory private; "
            "allow prctl(PR_SET_SECCOMP) where this runs",
        )
