"""What /proc says of the host's threads: whose they are, what they are called, and when they end (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from fakefs.files import Caller

GROUPS_MAX = 64
"""How many supplementary groups of a thread are looked at."""


@dataclass(frozen=True, slots=True)
class HostThread:
    """What /proc says of a host thread."""

    tid: int
    parent: int  # of a thread that is not its group's leader: the leader; else the parent process
    comm: bytes
    uid: int
    gid: int
    groups: tuple[int, ...]
    tgid: int = 0


async def wait_for_exit(tid: int) -> None:
    """Return when a host thread has ended: by its pidfd, or that of its process for a thread of several."""
    try:
        fd = os.pidfd_open(tid)
    except OSError:
        while read_comm(tid):  # a thread of several: no pidfd for it before Linux 6.9
            await trio.sleep(0.5)
            continue
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def read_comm(tid: int) -> bytes:
    """Return a host thread's comm; empty when it is gone."""
    try:
        fd = os.open(f"/proc/{tid}/comm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 64).rstrip(b"\n")
    except OSError:
        return b""
    finally:
        os.close(fd)


def has_ended(tid: int) -> bool:
    """Has a host thread ended, waited for or not?"""
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def read_thread(caller: Caller) -> HostThread | None:
    """Return what /proc says of a caller; None when it is gone or out of sight (another pid namespace)."""
    try:
        with open(f"/proc/{caller.tid}/status", "rb") as file:
            text = file.read(8192)
    except OSError:
        return None
    return parse_status(text, caller)


def parse_status(text: bytes, caller: Caller) -> HostThread | None:
    """Parse /proc/TID/status (proc(5)); None when it is not one."""
    fields = dict(line.split(b":\t", 1) for line in text.split(b"\n") if b":\t" in line)
    try:
        tgid, ppid = int(fields[b"Tgid"]), int(fields[b"PPid"])
        groups = tuple(int(group) for group in fields.get(b"Groups", b"").split()[:GROUPS_MAX])
        comm = fields[b"Name"]
    except (KeyError, ValueError):
        return None
    parent = ppid if tgid == caller.tid else tgid
    return HostThread(caller.tid, parent, comm, caller.uid, caller.gid, groups, tgid)
