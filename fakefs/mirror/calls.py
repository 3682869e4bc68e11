"""The system calls that are mirrored, and at which level: one table, which filter, recorder and daemon go by.

Numbers are those of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from fakefs.mirror import trampoline
from fakefs.mirror.seccomp import Rule


class Level(IntEnum):
    """How much of what a program does is done in the guest too."""

    OFF = 0
    PROCESS = 1
    FILES = 2
    ALL = 3


class Call(NamedTuple):
    """A mirrored call. `arguments` says what each of its arguments is, by a letter:

    P path, followed if it is a symbolic link; L path, not followed; D descriptor of the directory that the path
    behind it is relative to; F descriptor of an open file; T text; H address of a struct open_how; i number;
    O descriptor that the guest has a file of its own for; B address of data to write; b of room for an answer;
    S of a socket address; s size of what is before; n of room that the guest's call is not given;
    U user, G group, A address of an array of groups.

    A call without `arguments` is one that `recorder` knows by name. `only` tells which calls of it are notified.
    """

    number: int
    name: str
    level: Level
    arguments: str = ""
    only: tuple[Rule, ...] = ()


_ARCH_SET_FS = 0x1002
_PR_SET_NAME = 15
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030

_P, _F, _A = Level.PROCESS, Level.FILES, Level.ALL

TABLE = (
    # what a process is
    Call(273, "set_robust_list", _P),  # the first thing glibc does in a forked child or a new thread
    Call(59, "execve", _P),
    Call(322, "execveat", _P),
    Call(158, "arch_prctl", _P, only=(Rule(158, 0, value=_ARCH_SET_FS),)),  # and in a new program
    Call(60, "exit", _P),
    Call(231, "exit_group", _P),
    Call(157, "prctl", _P, only=(Rule(157, 0, value=_PR_SET_NAME),)),
    Call(95, "umask", _P, "i"),
    Call(109, "setpgid", _P, "ii"),
    Call(112, "setsid", _P),
    Call(105, "setuid", _P, "U"),
    Call(106, "setgid", _P, "G"),
    Call(113, "setreuid", _P, "UU"),
    Call(114, "setregid", _P, "GG"),
    Call(116, "setgroups", _P, "GA"),
    Call(117, "setresuid", _P, "UUU"),
    Call(119, "setresgid", _P, "GGG"),
    Call(122, "setfsuid", _P, "U"),
    Call(123, "setfsgid", _P, "G"),
    Call(35, "nanosleep", _P),
    Call(230, "clock_nanosleep", _P),
    Call(62, "kill", _P),
    Call(200, "tkill", _P),
    Call(234, "tgkill", _P),
    Call(298, "perf_event_open", _P),  # refused where it would be about another tracepoint than is meant
    # files by their names
    Call(2, "open", _F, "Pii"),
    Call(257, "openat", _F, "DPii"),
    Call(437, "openat2", _F, "DPH"),
    Call(85, "creat", _F, "Pi"),
    Call(87, "unlink", _F, "L"),
    Call(263, "unlinkat", _F, "DLi"),
    Call(82, "rename", _F, "LL"),
    Call(264, "renameat", _F, "DLDL"),
    Call(316, "renameat2", _F, "DLDLi"),
    Call(83, "mkdir", _F, "Li"),
    Call(258, "mkdirat", _F, "DLi"),
    Call(84, "rmdir", _F, "L"),
    Call(133, "mknod", _F, "Lii"),
    Call(259, "mknodat", _F, "DLii"),
    Call(76, "truncate", _F, "Pi"),
    Call(77, "ftruncate", _F, "Fi"),
    Call(88, "symlink", _F, "TL"),
    Call(266, "symlinkat", _F, "TDL"),
    Call(86, "link", _F, "LL"),
    Call(265, "linkat", _F, "DLDLi"),
    Call(90, "chmod", _F, "Pi"),
    Call(91, "fchmod", _F, "Fi"),
    Call(268, "fchmodat", _F, "DPi"),
    Call(92, "chown", _F, "Pii"),
    Call(94, "lchown", _F, "Lii"),
    Call(93, "fchown", _F, "Fii"),
    Call(260, "fchownat", _F, "DPiii"),
    Call(80, "chdir", _F, "P"),
    Call(81, "fchdir", _F, "F"),
    # what is waited for
    Call(61, "wait4", _A),
    Call(247, "waitid", _A),
    # what is looked at
    Call(4, "stat", _A, "Pb"),
    Call(6, "lstat", _A, "Lb"),
    Call(262, "newfstatat", _A, "DPbi"),
    Call(332, "statx", _A, "DPiib"),
    Call(21, "access", _A, "Pi"),
    Call(269, "faccessat", _A, "DPi"),
    Call(439, "faccessat2", _A, "DPii"),
    Call(89, "readlink", _A, "Lbi"),
    Call(267, "readlinkat", _A, "DLbi"),
    # sockets
    Call(41, "socket", _A),
    Call(42, "connect", _A, "OSs"),
    Call(49, "bind", _A, "OSs"),
    Call(50, "listen", _A, "Oi"),
    Call(43, "accept", _A, "Onn"),
    Call(288, "accept4", _A, "Onni"),
    Call(44, "sendto", _A, "OBsiSs"),
    Call(45, "recvfrom", _A, "Obsinn"),
    Call(48, "shutdown", _A, "Oi"),
    # open files
    Call(0, "read", _A, "Obi"),
    Call(1, "write", _A, "OBi"),
    Call(17, "pread64", _A, "Obii"),
    Call(18, "pwrite64", _A, "OBii"),
    Call(8, "lseek", _A, "Oii"),
    Call(5, "fstat", _A, "Ob"),
    Call(217, "getdents64", _A, "Obi"),
    Call(3, "close", _A, "O"),
    Call(32, "dup", _A, "O"),
    Call(33, "dup2", _A, "Oi"),
    Call(292, "dup3", _A, "Oii"),
    Call(72, "fcntl", _A, "Oii", (Rule(72, 1, value=_F_DUPFD), Rule(72, 1, value=_F_DUPFD_CLOEXEC))),
    Call(22, "pipe", _A, "b"),
    Call(293, "pipe2", _A, "bi"),
)

BY_NUMBER = {call.number: call for call in TABLE}
NUMBER = {call.name: call.number for call in TABLE}


def rules(level: Level) -> Iterable[Rule]:
    """Yield what the filter has to notify at a level."""
    for call in TABLE:
        if call.level <= level:
            yield from call.only or (Rule(call.number),)
    if level:
        yield Rule(trampoline.NUMBER)
