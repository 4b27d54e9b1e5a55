"""What Linux offers to take rights from the own process and its children: Landlock and seccomp.

Only the standard library is used: the launcher of Triton's stubs imports this file without the
mesh's packages. All of it takes effect for the calling process, survives `exec` and cannot be
undone.

https://docs.kernel.org/userspace-api/landlock.html
https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_SECUREBITS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 28, 22, 38, 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_SECCOMP_MODE_FILTER = 2

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_VERSION_QUESTION = 1
_RULE_PATH, _RULE_PORT = 1, 2
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _MAKE_DIR = 1 << 4, 1 << 7
_FOR_FILES_BITS = _EXECUTE | _WRITE_FILE | _READ_FILE
_FIRST_FILE_RIGHTS = (
    13  # of version 1; one more each in versions 2 (refer), 3 (truncate), 5 (ioctl)
)
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_REFER_VERSION, _TRUNCATE_VERSION, TCP_VERSION, _IOCTL_VERSION, SCOPE_VERSION = 2, 3, 4, 5, 6

CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION = 0x20080522

# seccomp: numbers of x86-64
_AUDIT_ARCH = 0xC000003E
_X32 = 0x40000000
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3, _PRLIMIT = 41, 53, 56, 435, 302
_DENIED_CALLS = {
    "ptrace": 101,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "bpf": 321,
    "userfaultfd": 323,
    # It makes and connects sockets past this filter.
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "pidfd_getfd": 438,
    # Landlock has no right for these; of a mesh that is not root's, all files are the model's.
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "fchownat": 260,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "removexattr": 197,
    "lremovexattr": 198,
    "fremovexattr": 199,
    "setxattrat": 463,
    "removexattrat": 466,
    "file_setattr": 469,
}
# As above, but libraries that copy files or make folders call them: they succeed and do nothing.
_CALLS_WITHOUT_EFFECT = {
    "chmod": 90,
    "fchmod": 91,
    "fchmodat": 268,
    "fchmodat2": 452,
    "utime": 132,
    "utimes": 235,
    "futimesat": 261,
    "utimensat": 280,
}
_CLONE_NEWUSER = 0x10000000
_AF_INET, _AF_INET6, _SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 2, 10, 1, 5, 0xF
# Not MPTCP and others: what they connect to is not checked by Landlock.
_PROTOCOLS = (0, 6)  # the default, TCP
# A call that sends and connects, which Landlock does not check.
_MSG_FASTOPEN = 0x20000000
_FLAGS_OF_SENDING = ((44, 3), (46, 2), (307, 3))  # sendto, sendmsg, sendmmsg; which argument

_LOAD, _JUMP_EQUAL, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, (16, 24, 32, 40)
_DENIED, _ALLOWED = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
# Other architectures have other numbers. Afterwards the number of the call is loaded.
_ONLY_X86_64 = (
    (_LOAD, 0, 0, _ARCH_AT),
    (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH),
    _DENIED,
    (_LOAD, 0, 0, _NUMBER_AT),
    (_JUMP_SET, 0, 1, _X32),
    _DENIED,
)


class ConfinementError(Exception):
    """The kernel refuses a restriction."""


def landlock_version() -> int:
    """Returns the version of Landlock's interface; 0: the kernel does not have it."""
    version = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_QUESTION)
    return max(0, int(version))


def seccomp_is_available() -> bool:
    """Returns whether `deny_sockets_and_calls` works here."""
    return platform.machine() == "x86_64" and Path("/proc/sys/kernel/seccomp").is_dir()


def drop_new_privileges() -> None:
    """Makes set-user-ID programs run without their owner's rights; the restrictions need it."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file has inputs and keys


def restrict_files(
    *,
    readable: Iterable[Path],
    writable: Iterable[Path],
    makes_folders: Iterable[Path] = (),
    listen_ports: Sequence[int],
    connect_ports: Sequence[int] = (),
    keeps_signals: bool = True,
) -> None:
    """Allows only these files and folders, with all that is in them, and only these TCP ports.

    In `makes_folders` the process may make and remove folders, and use no files. Paths that
    do not exist are skipped. TCP needs version 4 of Landlock. `keeps_signals` (version 6): no
    signal and no connection to an abstract socket leaves the processes that this one starts.
    Sockets with a path are not covered.

    Raises:
        ConfinementError: the kernel has no Landlock, or refuses.
    """
    version = landlock_version()
    if not version:
        raise ConfinementError("this kernel has no Landlock")
    rights = (1 << _FIRST_FILE_RIGHTS) - 1
    for since, right in (
        (_REFER_VERSION, 1 << 13),
        (_TRUNCATE_VERSION, _TRUNCATE),
        (_IOCTL_VERSION, _IOCTL),
    ):
        rights |= right if version >= since else 0
    tcp = _BIND_TCP | _CONNECT_TCP if version >= TCP_VERSION else 0
    can_scope = keeps_signals and version >= SCOPE_VERSION
    scopes = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if can_scope else 0
    attributes = struct.pack("<QQQ", rights, tcp, scopes)
    ruleset = _check(
        _libc.syscall(
            _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(_attributes_size(version)), 0
        ),
        "landlock_create_ruleset",
    )
    try:
        reading = _EXECUTE | _READ_FILE | _READ_DIR
        folders = _MAKE_DIR | _REMOVE_DIR
        for paths, allowed in (
            (readable, reading),
            (writable, rights),
            (makes_folders, folders),
        ):
            for path in paths:
                _allow_path(ruleset, path, allowed & rights)
        if tcp:
            for ports, right in ((listen_ports, _BIND_TCP), (connect_ports, _CONNECT_TCP)):
                for port in ports:
                    _add_rule(ruleset, _RULE_PORT, struct.pack("<QQ", right, port))
        _check(
            _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0),
            "landlock_restrict_self (is no_new_privs set?)",
        )
    finally:
        os.close(ruleset)


def deny_sockets_and_calls() -> None:
    """Allows sockets of TCP only: no Unix sockets, UDP, or anything else that leaves the process.

    Also denies calls that reach into other processes or around the other restrictions, or change
    owners and attributes of files; those that change modes and times succeed and do nothing. Pairs
    of connected sockets work. Call `drop_new_privileges` before.

    Raises:
        ConfinementError: the kernel refuses.
    """
    _install(_filter())


def _install(program: Sequence[tuple[int, int, int, int]]) -> None:
    instructions = b"".join(struct.pack("<HBBI", *each) for each in program)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def become(user_id: int, *, keep_reading: bool) -> None:
    """Changes the user and group of this process, which is root's, to others without rights.

    Args:
        user_id: of the user, and of the group.
        keep_reading: whether the process may read all files, whoever owns them. Only with
            `restrict_files`: it lets a user who owns nothing use folders that root alone can enter.
    """
    if keep_reading:
        # Without this, access(2) answers as if there were no capability, and Triton asks it.
        bits = _SECBIT_NO_SETUID_FIXUP
        _check(_libc.prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0), "PR_SET_SECUREBITS")
    os.setgroups([])
    os.setresgid(user_id, user_id, user_id)
    os.setresuid(user_id, user_id, user_id)
    kept = 1 << CAP_DAC_READ_SEARCH if keep_reading else 0
    header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable; each has 64 bits in two parts.
    data = struct.pack("<IIIIII", kept, kept, kept, 0, 0, 0)
    _check(_libc.capset(header, data), "capset")
    if keep_reading:
        _check(
            _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0),
            "PR_CAP_AMBIENT_RAISE",
        )


def _attributes_size(version: int) -> int:
    if version >= SCOPE_VERSION:
        return 24
    return 16 if version >= TCP_VERSION else 8


def _allow_path(ruleset: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            rights &= _FOR_FILES_BITS | _TRUNCATE | _IOCTL
        _add_rule(ruleset, _RULE_PATH, struct.pack("<Qi", rights, opened))
    finally:
        os.close(opened)


def _add_rule(ruleset: int, kind: int, attributes: bytes) -> None:
    _check(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, kind, attributes, 0), "landlock_add_rule")


def _filter() -> list[tuple[int, int, int, int]]:
    """Returns the filter: code, jump if true, jump if false, value."""
    deny, allow = _DENIED, _ALLOWED
    program = [*_ONLY_X86_64]
    for number in _DENIED_CALLS.values():
        program += [(_JUMP_EQUAL, 0, 1, number), deny]
    for number in _CALLS_WITHOUT_EFFECT.values():
        program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO)]
    # Its flags are in memory, which a filter cannot read: libraries use clone instead.
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for number, argument, flag in (
        (_CLONE, 0, _CLONE_NEWUSER),
        *((number, argument, _MSG_FASTOPEN) for number, argument in _FLAGS_OF_SENDING),
    ):
        program += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENT_AT[argument]),
            (_JUMP_SET, 0, 1, flag),
            deny,
            allow,
        ]
    program += [  # only its own limits
        (_JUMP_EQUAL, 0, 4, _PRLIMIT),
        (_LOAD, 0, 0, _ARGUMENT_AT[0]),
        (_JUMP_EQUAL, 1, 0, 0),
        deny,
        allow,
    ]
    program += [  # pairs of datagram sockets can be connected to other Unix sockets
        (_JUMP_EQUAL, 0, 6, _SOCKETPAIR),
        (_LOAD, 0, 0, _ARGUMENT_AT[1]),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        (_JUMP_EQUAL, 2, 0, _SOCK_STREAM),
        (_JUMP_EQUAL, 1, 0, _SOCK_SEQPACKET),
        deny,
        allow,
    ]
    program += [
        (_JUMP_EQUAL, 1, 0, _SOCKET),
        allow,
        (_LOAD, 0, 0, _ARGUMENT_AT[0]),
        (_JUMP_EQUAL, 2, 0, _AF_INET),
        (_JUMP_EQUAL, 1, 0, _AF_INET6),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_LOAD, 0, 0, _ARGUMENT_AT[1]),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        (_JUMP_EQUAL, 1, 0, _SOCK_STREAM),
        deny,
        (_LOAD, 0, 0, _ARGUMENT_AT[2]),
        (_JUMP_EQUAL, 2, 0, _PROTOCOLS[0]),
        (_JUMP_EQUAL, 1, 0, _PROTOCOLS[1]),
        (_RETURN, 0, 0, _ERRNO | errno.EPROTONOSUPPORT),
        allow,
    ]
    return program


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise ConfinementError(f"{what}: {os.strerror(number)}")
    return result
