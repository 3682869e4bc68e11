"""The x86-64 system calls the guest is asked for: numbers (arch/x86/entry/syscalls/syscall_64.tbl) and results."""

from __future__ import annotations

import os
from enum import IntEnum

# <linux/fcntl.h>
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_REMOVEDIR = 0x200


class Sys(IntEnum):
    """A system call, by the name the manual gives it."""

    READ = 0
    WRITE = 1
    CLOSE = 3
    POLL = 7
    LSEEK = 8
    MMAP = 9
    MUNMAP = 11
    RT_SIGACTION = 13
    RT_SIGPROCMASK = 14
    IOCTL = 16
    PREAD64 = 17
    DUP = 32
    DUP2 = 33
    NANOSLEEP = 35
    SOCKET = 41
    SOCKETPAIR = 53
    EXECVE = 59
    EXIT = 60
    WAIT4 = 61
    KILL = 62
    FCNTL = 72
    TRUNCATE = 76
    FTRUNCATE = 77
    CHDIR = 80
    UMASK = 95
    SYSINFO = 99
    GETEUID = 107
    SETSID = 112
    SETGROUPS = 116
    SETRESUID = 117
    SETRESGID = 119
    RT_SIGPENDING = 127
    RT_SIGQUEUEINFO = 129
    PRCTL = 157
    CHROOT = 161
    MOUNT = 165
    DELETE_MODULE = 176
    TKILL = 200
    GETDENTS64 = 217
    CLOCK_SETTIME = 227
    CLOCK_NANOSLEEP = 230
    EXIT_GROUP = 231
    OPENAT = 257
    MKDIRAT = 258
    MKNODAT = 259
    FCHOWNAT = 260
    UNLINKAT = 263
    LINKAT = 265
    SYMLINKAT = 266
    READLINKAT = 267
    FCHMODAT = 268
    PIPE2 = 293
    RT_TGSIGQUEUEINFO = 297
    PERF_EVENT_OPEN = 298
    PRLIMIT64 = 302
    RENAMEAT2 = 316
    FINIT_MODULE = 313
    MEMFD_CREATE = 319
    STATX = 332
    PIDFD_SEND_SIGNAL = 424
    PIDFD_OPEN = 434
    CLOSE_RANGE = 436
    PIDFD_GETFD = 438


def check(result: int) -> int:
    """Return what a system call returned. Raises the OSError that it stands for."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
