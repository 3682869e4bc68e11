"""The shadow of a thread of the host's whose calls are mirrored: what is known of it, and of its files in the guest."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import NamedTuple

from emulator.agent import OTHER_ROOT, WINDOW_FD, Call, Request, Task
from fakefs.mirror.records import Birth, Used
from fakefs.mirror.sleepers import INTERRUPT
from fakefs.shadow import Handle, Shadow
from fakefs.syscalls import Sys

_UNCLAIMED_MAX = 16

Ending = Callable[[], Awaitable[None]]
Returned = Callable[[list[int]], None]


class Blocked(NamedTuple):
    """A call that was begun. `until`: the host's monotonic time at which it is over, if it does not wait for ever.

    `ending` does in the guest what has ended the call on the host, as far as that can be said. `returned` is told of
    the results.
    """

    request: Request
    calls: Sequence[Call]
    until: float | None
    ending: Ending | None = None
    returned: Returned | None = None


class OpenFile(NamedTuple):
    """A file of the guest for one that the host has open at a descriptor: of the same path, or /dev/null for none."""

    path: str
    flags: int
    fd: int
    position: int

    def is_for(self, used: Used) -> bool:
        """Is what a record tells of this file?"""
        return self.path == used.file.text and not (self.flags ^ used.flags) & os.O_ACCMODE


def kind_of_file(path: str, flags: int) -> str:
    """Return what tells one file opened by its path from others that wait for their use."""
    return f"{path} {flags & os.O_ACCMODE}"


class Unclaimed(NamedTuple):
    """What a call has opened in the guest, and no call on the host's was seen yet.

    `kind` is what is known of that: the path and how it was opened, or of what has none as `connections` says.
    """

    kind: str
    fd: int
    tid: int  # of the thread on the host


class Probed:
    """What the probes of a process need in the guest; its threads share it.

    `descriptors` are of the files with probes, `catches`: it has handlers for exceptions; `trampoline` is where its
    kernel has functions return to, 0 while that is not known.
    """

    __slots__ = ("catches", "descriptors", "trampoline")

    def __init__(self) -> None:
        self.catches = False
        self.descriptors: dict[int, int] = {}
        self.trampoline = 0

    def copy(self) -> Probed:
        """Return what a forked process has."""
        other = Probed()
        other.catches, other.descriptors, other.trampoline = self.catches, dict(self.descriptors), self.trampoline
        return other


class Mirrored(Shadow):
    """The shadow of a thread whose calls are mirrored. `cwd` and `umask` are those its process has in the guest.

    `files` are the open files that it was seen to use, by their descriptors on the host. `rooms` are those it has of
    `fakefs.mirror.rooms`. `doomed` is the last signal that will have ended it, if nothing else is known of its end.
    `sent` are signals with a handler on the host that a shadow has sent its process, and that no handler has been run
    for yet; threads share it.
    """

    __slots__ = (
        "blocked",
        "cwd",
        "doomed",
        "ended",
        "files",
        "parent",
        "probed",
        "rooms",
        "sent",
        "status",
        "tgid",
        "umask",
        "unclaimed",
    )
    apart = True
    root = OTHER_ROOT
    interrupted_by = INTERRUPT

    def __init__(self, task: Task, birth: Birth, descriptors: dict[Handle, int]) -> None:
        super().__init__(task, birth.tid, os.fsencode(birth.comm), descriptors)
        self.tgid = birth.tgid
        self.parent = birth.parent
        self.umask = birth.umask
        self.files: dict[int, OpenFile] = {}
        self.unclaimed: list[Unclaimed] = []
        self.rooms: set[bool] = set()
        self.probed = Probed()
        self.sent: set[int] = set()
        self.cwd = "/"
        self.ended = False  # its process has, on the host, without telling
        self.status: int | None = None  # with which it has
        self.blocked: Blocked | None = None
        self.doomed = int(signal.SIGKILL)

    def opened(self, kind: str, fd: int) -> list[Call]:
        """A call has opened something: it waits for the host's use. Return the calls that close what has too long."""
        self.unclaimed.append(Unclaimed(kind, fd, self.tid))
        return [(Sys.CLOSE, self.unclaimed.pop(0).fd) for _ in range(len(self.unclaimed) - _UNCLAIMED_MAX)]

    def claim(self, kind: str, tid: int | None = None) -> int:
        """Return a descriptor that waits, or one that a call of some thread has returned; else -ENOENT."""
        return self._claim([each for each in self.unclaimed if each.kind == kind and tid in (None, each.tid)])

    def claim_file(self, path: str, flags: int, fd: int) -> int:
        """The same for a file that has a path: the one with a number, or the last one."""
        waiting = [each for each in self.unclaimed if each.kind == kind_of_file(path, flags)]
        return self._claim([each for each in waiting if each.fd == fd] or waiting[-1:])

    def _claim(self, waiting: list[Unclaimed]) -> int:
        if not waiting:
            return -errno.ENOENT
        self.unclaimed.remove(waiting[0])
        return waiting[0].fd

    @property
    def next_descriptors(self) -> tuple[int, int]:
        """The numbers that the next files it opens will have: the lowest that are free."""
        taken = {WINDOW_FD, *self.descriptors.values(), *(file.fd for file in self.files.values())}
        taken.update(each.fd for each in self.unclaimed)
        free = (fd for fd in count() if fd not in taken)
        return next(free), next(free)
