"""What the host has open at a descriptor that a call is about, as the record of the call says it: proc(5).

Regular files, directories and named pipes have their path; pipes, sockets, terminals, and what calls of the table
return the name that the kernel shows for them. Everything else has none.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from fakefs.mirror.calls import TABLE, Call
from fakefs.mirror.endpoints import Endpoints
from fakefs.mirror.hostpaths import HostPaths, NotMirrored, is_kernels
from fakefs.mirror.parts import Parts
from fakefs.mirror.records import PathArgument, Transfer, Used
from fakefs.mirror.seccomp import Notification

_INFO_MAX = 4096
_DESCRIPTORS_MAX = 4096
_KINDS = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO))
_NOTHING = PathArgument("", [])
_ANONYMOUS = frozenset(call.returns for call in TABLE)


class Info(NamedTuple):
    """What /proc/PID/fdinfo says of an open file: its position in bytes, and the flags of open(2)."""

    position: int
    flags: int


def transfer(notification: Notification, call: Call, pid: int, paths: HostPaths, endpoints: Endpoints) -> Transfer:
    """Return the record of a call on open files.

    `pid` is the process of the thread. Raises OSError and ValueError when there are none, and NotMirrored.
    """
    read = Parts(notification, call, paths)
    looked_at = partial(look, notification.tid, pid, paths=paths, endpoints=endpoints)
    pairs = zip(call.arguments, notification.arguments, strict=False)
    files = [looked_at(value & 0x7FFFFFFF) for letter, value in pairs if letter == "O"]
    for fd in read.descriptors():
        with suppress(OSError, ValueError, NotMirrored):
            file = looked_at(fd)
            if file.file.text:
                files.append(file)
    return Transfer(notification.tid, call.number, files, read.arguments, read.parts, read.needed)


def look(tid: int, pid: int, fd: int, paths: HostPaths, endpoints: Endpoints) -> Used:
    """Return what is said of an open file of a thread's process. Raises OSError and ValueError when there is none."""
    with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as file:
        info = parse_info(file.read(_INFO_MAX))
    link = os.readlink(f"/proc/{tid}/fd/{fd}")
    is_socket = link.startswith("socket:[")
    return Used(fd, PathArgument(endpoints.named(pid, fd, link), []) if is_socket else _named(link, paths), *info)


def _named(link: str, paths: HostPaths) -> PathArgument:
    if link.startswith(("pipe:[", "/dev/pts/")) or link == "/dev/tty" or link in _ANONYMOUS:
        return PathArgument(link, [])
    if not link.startswith("/") or is_kernels(link) or link.endswith(" (deleted)"):
        return _NOTHING
    found = PathArgument(link, paths.look(link, follow=False))
    return found if stat.S_IFMT(found.entry.mode) in _KINDS else _NOTHING


def parse_info(text: bytes) -> Info:
    """Parse /proc/PID/fdinfo/FD. Raises ValueError when it is something else."""
    fields = dict(line.split(b":", 1) for line in text.split(b"\n") if b":" in line)
    try:
        return Info(int(fields[b"pos"]), int(fields[b"flags"], 8))
    except KeyError as error:
        raise ValueError("not /proc/PID/fdinfo") from error


def descriptors(tid: int) -> list[int]:
    """Return the numbers of a process's open files, up to 4096 of them. Raises OSError when it is gone."""
    with os.scandir(f"/proc/{tid}/fd") as entries:
        return [int(entry.name) for entry, _ in zip(entries, range(_DESCRIPTORS_MAX), strict=False)]
