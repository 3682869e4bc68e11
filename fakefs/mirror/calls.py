"""The system calls that are mirrored, and at which level: one table, which filter, recorder and daemon go by.

Numbers are those of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from fakefs.mirror import trampoline
from fakefs.mirror.seccomp import Rule
from fakefs.mirror.sigframe import RT_SIGRETURN


class Level(IntEnum):
    """How much of what a program does is done in the guest too."""

    OFF = 0
    PROCESS = 1
    FILES = 2
    ALL = 3


class Call(NamedTuple):
    """A mirrored call. `arguments` says what each of its arguments is, by a letter; of a call about files by name:

    P path, followed if it is a symbolic link; L path, not followed; D descriptor of the directory that the path
    behind it is relative to; F descriptor of an open file; H address of a struct open_how.

    Of a call about files that are open:

    O descriptor; p address of an array of struct pollfd; e of an fd_set; V of an array of struct iovec to write from,
    v to read to; M of a struct msghdr to send, m to receive; S of a socket's address; a of room for one; l of an int
    with the size of the room before; c how many of what is before; k how many bytes the kernel is to move by itself;
    t of a struct timespec, u of a struct timeval, w ms that it waits; E no path: the descriptor before is meant.

    Of both: T text; i number; B address of data to write; b of room for an answer; s size of what is before; n what the
    guest's call is not given. U, G and A are users, groups and the address of an array of groups.

    A call without `arguments` is one that `recorder` knows by name. `only` tells which calls of it are notified.
    `sizes` are those of what B and b stand for, in bytes, where no s or l says it; before a c, of one of them.
    `returns` is what /proc/PID/fd shows of the descriptor that it returns.
    """

    number: int
    name: str
    level: Level
    arguments: str = ""
    only: tuple[Rule, ...] = ()
    sizes: tuple[int, ...] = ()
    returns: str = ""

    @property
    def is_on_open_files(self) -> bool:
        """Is it about files that are open?"""
        return not _OF_OPEN_FILES.isdisjoint(self.arguments)

    @property
    def without_path(self) -> Call:
        """It, when its path is empty: then it is about the descriptor before that."""
        return self._replace(arguments=self.arguments.replace("DP", "OE"))


_OF_OPEN_FILES = frozenset("Ope")
_ARCH_SET_FS = 0x1002
_PR_SET_NAME = 15
_MAP_SHARED = 1
F_DUPLICATES = (0, 1030)
"""Commands of fcntl(2): F_DUPFD, F_DUPFD_CLOEXEC."""
_F_OF_NUMBERS = (1, 2, 3, 4, 1031, 1032)  # F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_SETPIPE_SZ, F_GETPIPE_SZ
_F_OF_LOCKS = (5, 6, 7, 36, 37, 38)  # F_GETLK, F_SETLK, F_SETLKW, and those of open file descriptions
_IOCTLS_THAT_ASK = (0x5401, 0x5413, 0x540F, 0x541B)  # TCGETS, TIOCGWINSZ, TIOCGPGRP, FIONREAD
_FIONBIO = 0x5421
_TIMES, _FLOCK, _EPOLL_EVENT, _ITIMERSPEC, _STATFS, _TERMIOS = 32, 32, 12, 32, 120, 36

_P, _F, _A = Level.PROCESS, Level.FILES, Level.ALL


def _commands(number: int, *values: int) -> tuple[Rule, ...]:
    """Of fcntl(2) or ioctl(2)."""
    return tuple(Rule(number, 1, value=value) for value in values)


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
    Call(129, "rt_sigqueueinfo", _P),
    Call(297, "rt_tgsigqueueinfo", _P),
    Call(424, "pidfd_send_signal", _P),
    Call(RT_SIGRETURN, "rt_sigreturn", _P),  # a handler has been run
    # events of perf, which are the guest's: what is done with their descriptors
    Call(298, "perf_event_open", _P),
    Call(16, "ioctl", _P, only=(Rule(16, 1, mask=0xFF00, value=ord("$") << 8),)),
    Call(9, "mmap", _P, only=(Rule(9, 3, mask=_MAP_SHARED),)),
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
    Call(452, "fchmodat2", _F, "DPii"),
    Call(92, "chown", _F, "Pii"),
    Call(94, "lchown", _F, "Lii"),
    Call(93, "fchown", _F, "Fii"),
    Call(260, "fchownat", _F, "DPiii"),
    Call(132, "utime", _F, "PB", sizes=(16,)),
    Call(235, "utimes", _F, "PB", sizes=(_TIMES,)),
    Call(261, "futimesat", _F, "DPB", sizes=(_TIMES,)),
    Call(280, "utimensat", _F, "DPBi", sizes=(_TIMES,)),
    Call(188, "setxattr", _F, "PTBsi"),
    Call(189, "lsetxattr", _F, "LTBsi"),
    Call(190, "fsetxattr", _F, "FTBsi"),
    Call(197, "removexattr", _F, "PT"),
    Call(198, "lremovexattr", _F, "LT"),
    Call(199, "fremovexattr", _F, "FT"),
    Call(80, "chdir", _F, "P"),
    Call(81, "fchdir", _F, "F"),
    # what is waited for
    Call(434, "pidfd_open", _A, "ii", returns="anon_inode:[pidfd]"),
    Call(61, "wait4", _A),
    Call(247, "waitid", _A),
    # what is looked at
    Call(4, "stat", _A, "Pb"),
    Call(6, "lstat", _A, "Lb"),
    Call(262, "newfstatat", _A, "DPbi", sizes=(144,)),
    Call(332, "statx", _A, "DPiib", sizes=(256,)),
    Call(137, "statfs", _A, "Pb"),
    Call(21, "access", _A, "Pi"),
    Call(269, "faccessat", _A, "DPi"),
    Call(439, "faccessat2", _A, "DPii"),
    Call(89, "readlink", _A, "Lbs"),
    Call(267, "readlinkat", _A, "DLbs"),
    Call(191, "getxattr", _A, "PTbs"),
    Call(192, "lgetxattr", _A, "LTbs"),
    Call(194, "listxattr", _A, "Pbs"),
    Call(195, "llistxattr", _A, "Lbs"),
    Call(79, "getcwd", _A, "bs"),
    # sockets
    Call(41, "socket", _A, "iii", returns="socket:"),
    Call(53, "socketpair", _A, "iiib", returns="socket:"),
    Call(42, "connect", _A, "OSs"),
    Call(49, "bind", _A, "OSs"),
    Call(50, "listen", _A, "Oi"),
    Call(43, "accept", _A, "Oal"),
    Call(288, "accept4", _A, "Oali"),
    Call(44, "sendto", _A, "OBsiSs"),
    Call(45, "recvfrom", _A, "Obsial"),
    Call(46, "sendmsg", _A, "OMi"),
    Call(47, "recvmsg", _A, "Omi"),
    Call(307, "sendmmsg", _A, "OMci"),
    Call(299, "recvmmsg", _A, "Omcin"),
    Call(48, "shutdown", _A, "Oi"),
    Call(51, "getsockname", _A, "Oal"),
    Call(52, "getpeername", _A, "Oal"),
    Call(54, "setsockopt", _A, "OiiBs"),
    Call(55, "getsockopt", _A, "Oiibl"),
    # what is waited for of open files
    Call(7, "poll", _A, "pcw"),
    Call(271, "ppoll", _A, "pctni"),
    Call(23, "select", _A, "ceeeu"),
    Call(270, "pselect6", _A, "ceeetn"),
    Call(213, "epoll_create", _A, "i", returns="anon_inode:[eventpoll]"),
    Call(291, "epoll_create1", _A, "i", returns="anon_inode:[eventpoll]"),
    Call(233, "epoll_ctl", _A, "OiOB", sizes=(_EPOLL_EVENT,)),
    Call(232, "epoll_wait", _A, "Obcw", sizes=(_EPOLL_EVENT,)),
    Call(281, "epoll_pwait", _A, "Obcwni", sizes=(_EPOLL_EVENT,)),
    Call(441, "epoll_pwait2", _A, "Obctni", sizes=(_EPOLL_EVENT,)),
    Call(284, "eventfd", _A, "i", returns="anon_inode:[eventfd]"),
    Call(290, "eventfd2", _A, "ii", returns="anon_inode:[eventfd]"),
    Call(283, "timerfd_create", _A, "ii", returns="anon_inode:[timerfd]"),
    Call(286, "timerfd_settime", _A, "OiBb", sizes=(_ITIMERSPEC, _ITIMERSPEC)),
    Call(287, "timerfd_gettime", _A, "Ob", sizes=(_ITIMERSPEC,)),
    # open files
    Call(0, "read", _A, "Obs"),
    Call(1, "write", _A, "OBs"),
    Call(17, "pread64", _A, "Obsi"),
    Call(18, "pwrite64", _A, "OBsi"),
    Call(19, "readv", _A, "Ovc"),
    Call(20, "writev", _A, "OVc"),
    Call(295, "preadv", _A, "Ovcii"),
    Call(296, "pwritev", _A, "OVcii"),
    Call(327, "preadv2", _A, "Ovciii"),
    Call(328, "pwritev2", _A, "OVciii"),
    Call(40, "sendfile", _A, "OOBk", sizes=(8,)),
    Call(326, "copy_file_range", _A, "OBOBki", sizes=(8, 8)),
    Call(275, "splice", _A, "OBOBki", sizes=(8, 8)),
    Call(276, "tee", _A, "OOki"),
    Call(8, "lseek", _A, "Oii"),
    Call(5, "fstat", _A, "Ob", sizes=(144,)),
    Call(138, "fstatfs", _A, "Ob", sizes=(_STATFS,)),
    Call(193, "fgetxattr", _A, "OTbs"),
    Call(196, "flistxattr", _A, "Obs"),
    Call(74, "fsync", _A, "O"),
    Call(75, "fdatasync", _A, "O"),
    Call(306, "syncfs", _A, "O"),
    Call(285, "fallocate", _A, "Oiik"),
    Call(221, "fadvise64", _A, "Oiii"),
    Call(73, "flock", _A, "Oi"),
    Call(78, "getdents", _A, "Obs"),
    Call(217, "getdents64", _A, "Obs"),
    Call(3, "close", _A, "O"),
    Call(436, "close_range", _A, "iii"),
    Call(32, "dup", _A, "O"),
    Call(33, "dup2", _A, "Oi"),
    Call(292, "dup3", _A, "Oii"),
    Call(72, "fcntl", _A, "Oii", _commands(72, *F_DUPLICATES, *_F_OF_NUMBERS)),
    Call(72, "fcntl", _A, "OiB", _commands(72, *_F_OF_LOCKS), sizes=(_FLOCK,)),
    Call(16, "ioctl", _A, "Oib", _commands(16, *_IOCTLS_THAT_ASK), sizes=(_TERMIOS,)),
    Call(16, "ioctl", _A, "OiB", _commands(16, _FIONBIO), sizes=(4,)),
    Call(22, "pipe", _A, "b"),
    Call(293, "pipe2", _A, "bi"),
)

BY_NUMBER = {call.number: call for call in reversed(TABLE)}
NUMBER = {call.name: call.number for call in TABLE}
LOOKS = {NUMBER["open"]: 1, NUMBER["openat"]: 2, NUMBER["openat2"]: 2} | dict.fromkeys(
    NUMBER[name]
    for name in (
        *("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"),
        *("statfs", "getxattr", "lgetxattr", "listxattr", "llistxattr"),
    )
)
"""Calls that look at a file and change nothing. Of some an argument of the record, which is the number, has flags."""
CHANGING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
"""Flags with which they do."""
_SEVERAL = {
    call.number: [each for each in TABLE if each.number == call.number]
    for call in TABLE
    if BY_NUMBER[call.number] is not call
}


def find(number: int, arguments: Sequence[int]) -> Call:
    """Return the entry of a call that was notified. Raises KeyError."""
    for call in _SEVERAL.get(number, ()):
        if any(rule.matches(arguments) for rule in call.only):
            return call
    return BY_NUMBER[number]


def rules(level: Level) -> Iterable[Rule]:
    """Yield what the filter has to notify at a level."""
    for call in TABLE:
        if call.level <= level:
            yield from call.only or (Rule(call.number),)
    if level:
        yield Rule(trampoline.NUMBER)
