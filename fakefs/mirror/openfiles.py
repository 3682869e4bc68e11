"""What the host has open at a descriptor that a call is about, as the record of the call says it: proc(5).

Regular files, directories and named pipes have their path, pipes and terminals the name that the kernel shows for
them. Everything else has none.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from fakefs.mirror.calls import Call
from fakefs.mirror.endpoints import ADDRESS_MAX, Endpoints, address_in_guest
from fakefs.mirror.hostpaths import HostPaths, is_kernels
from fakefs.mirror.records import PathArgument, Transfer
from fakefs.mirror.seccomp import Notification, read_memory

DATA_MAX = 4096
"""Bytes of what one call writes that are written in the guest too; the rest is zeros there."""
_INFO_MAX = 4096
_DESCRIPTORS_MAX = 4096
_KINDS = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO))
_NOTHING = PathArgument("", [])


class Info(NamedTuple):
    """What /proc/PID/fdinfo says of an open file: its position in bytes, and the flags of open(2)."""

    position: int
    flags: int


def used(notification: Notification, call: Call, pid: int, paths: HostPaths, endpoints: Endpoints) -> Transfer:
    """Return the record of a call on an open file.

    `pid` is the process of the thread. Raises OSError and ValueError when there is none, and NotMirrored.
    """
    tid, fd = notification.tid, notification.arguments[0] & 0x7FFFFFFF
    with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as file:
        info = parse_info(file.read(_INFO_MAX))
    link = os.readlink(f"/proc/{tid}/fd/{fd}")
    is_socket = link.startswith("socket:[")
    what = PathArgument(endpoints.named(pid, fd, link), []) if is_socket else _named(link, paths)
    arguments: list[int | None] = []
    data = address = b""
    for letter, value in zip(call.arguments[1:], notification.arguments[1:], strict=False):
        arguments.append(None if letter in "Bb" else value & (1 << 63) - 1)
        if letter == "B":
            data = read_memory(tid, value, min(notification.arguments[2], DATA_MAX))
        elif letter == "S" and value:
            size = notification.arguments[len(arguments) + 1] & 0xFFFFFFFF
            address = read_memory(tid, value, min(size, ADDRESS_MAX))
            address, directory = address_in_guest(address, os.readlink(f"/proc/{tid}/cwd"), paths)
            what = what._replace(entries=[] if directory is None else directory.entries)
    return Transfer(tid, call.number, fd, what, *info, arguments, data.decode("latin-1"), address.decode("latin-1"))


def _named(link: str, paths: HostPaths) -> PathArgument:
    if link.startswith(("pipe:[", "/dev/pts/")) or link == "/dev/tty":
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
