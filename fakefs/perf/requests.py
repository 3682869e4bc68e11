"""The recorder's part of perf events: which calls are about the guest's, what they ask for, and their answers.

Unlike other calls these are not made on the host: each waits until the daemon has told what it comes to in the guest.
An event is a file of our mount. The recorder opens it and gives its descriptor to the process; what is done with that
by read(2), poll(2) and close(2) is a request to the mount. Which event a descriptor is of tells its path.

Follows perf_event_open(2) and <linux/perf_event.h>.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from fakefs.mirror.arguments import signed
from fakefs.mirror.calls import NUMBER
from fakefs.mirror.notes import HELD_MAX
from fakefs.mirror.records import EventAnswer, EventControl, EventMap, EventOpen, Record
from fakefs.mirror.seccomp import Listener, Notification, read_memory, read_string

_TYPE_SOFTWARE, _TYPE_TRACEPOINT, _SW_DUMMY = 1, 2, 9
_HEAD = struct.Struct("<IIQ")  # of struct perf_event_attr: type, size, config
_ATTR_SMALLEST, _ATTR_MOST = 64, 4096
_FLAG_PID_CGROUP, _FLAG_CLOEXEC = 4, 8
_MAP_ANONYMOUS = 0x20

ENABLE, DISABLE, REFRESH, RESET, SET_OUTPUT = 0x2400, 0x2401, 0x2402, 0x2403, 0x2405
PERIOD, SET_FILTER, ID, PAUSE_OUTPUT = 0x40082404, 0x40082406, 0x80082407, 0x40042409
_NUMBERS = (ENABLE, DISABLE, REFRESH, RESET, PAUSE_OUTPUT)
"""The requests that come with a number, or nothing."""

_NAME = re.compile(r"/\.perf-event-([0-9]+)-[0-9a-f]{16}( \(deleted\))?")
FAR = (1 << 40) + 1
"""Where reading of an event begins: behind all that can be mapped, and never at the beginning of a page."""


class Refused(Exception):
    """`number` is the error that such a call fails with."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Held(Exception):
    """The call waits until the daemon has answered."""


def file_name(event: int, token: str) -> str:
    """Return the name of an event's file. `token`, 16 hexadecimal digits, is to be guessed by nobody."""
    return f".perf-event-{event}-{token}"


class EventCalls:
    """`directory` is one of our mount.

    `found` returns the records of a process that is named, if nothing was seen of it before. `waiting` is told the ids
    of the calls that wait.
    """

    def __init__(
        self,
        listener: Listener,
        directory: Path,
        found: Callable[[int], Iterator[Record]],
        waiting: Callable[[Collection[int]], None],
    ) -> None:
        self._listener = listener
        self._directory = directory
        self._found = found
        self._waiting = waiting
        self._held: dict[int, Notification] = {}
        self._any = False

    # ---- what is asked

    def opened(self, notification: Notification) -> Iterator[Record]:
        """perf_event_open(2). Nothing for an event of the host's: of its processor and its software.

        What a program opens beside tracepoints to be told of processes is of the guest too: the samples are of its.
        """
        at, pid, cpu, group, flags, _ = notification.arguments
        tid = notification.tid
        kind, size, config = _HEAD.unpack(_read(tid, at, _HEAD.size))
        follows = kind == _TYPE_SOFTWARE and config == _SW_DUMMY and self._any and self._has_events(tid)
        if kind != _TYPE_TRACEPOINT and not follows:
            return
        size = size or _ATTR_SMALLEST
        if not _ATTR_SMALLEST <= size <= _ATTR_MOST:
            raise Refused(errno.E2BIG)
        attr = _read(tid, at, size)
        group = signed(group)
        if flags & _FLAG_PID_CGROUP or (group != -1 and self._event(tid, group) is None):
            raise Refused(errno.EBADF)
        group = -1 if group == -1 else self._event(tid, group) or 0
        pid = signed(pid) or tid
        if pid > 0:
            yield from self._found(pid)
        text = base64.b64encode(attr).decode()
        yield EventOpen(tid, notification.id, text, pid, signed(cpu), group, flags)
        raise Held

    def controlled(self, notification: Notification) -> Iterator[Record]:
        """ioctl(2), of the kind that events have."""
        tid = notification.tid
        fd, request, argument = notification.arguments[0], notification.arguments[1] & 0xFFFFFFFF, 0
        event, value, text = self._event(tid, fd), notification.arguments[2], ""
        if event is None:
            return
        if request in _NUMBERS:
            argument = value & 0xFFFFFFFF
        elif request == PERIOD:
            [argument] = struct.unpack("<Q", _read(tid, value, 8))
        elif request == SET_OUTPUT:
            output = -1 if signed(value) == -1 else self._event(tid, value)
            if output is None:
                raise Refused(errno.EBADF)
            argument = output
        elif request == SET_FILTER:
            found = read_string(tid, value)
            if found is None:
                raise Refused(errno.EFAULT)
            text = os.fsdecode(found)
        elif request != ID:
            raise Refused(errno.ENOTTY)
        yield EventControl(tid, notification.id, event, request, argument, text)
        raise Held

    def mapped(self, notification: Notification) -> Iterator[Record]:
        """mmap(2), shared."""
        _, length, protection, flags, fd, offset = notification.arguments
        event = None if flags & _MAP_ANONYMOUS else self._event(notification.tid, fd)
        if event is None:
            return
        if offset or length >= 1 << 32:
            raise Refused(errno.EINVAL)
        yield EventMap(notification.tid, notification.id, event, length, protection & 0xFF)
        raise Held

    def _event(self, tid: int, fd: int) -> int | None:
        """Return the number of the event that a descriptor of a process is of; None when it is of something else."""
        if not self._any:
            return None
        with suppress(OSError):
            if match := _NAME.search(os.readlink(f"/proc/{tid}/fd/{signed(fd)}")):
                return int(match[1])
        return None

    def _has_events(self, tid: int) -> bool:
        try:
            return any(self._event(tid, int(fd)) is not None for fd in os.listdir(f"/proc/{tid}/fd"))
        except OSError:
            return False

    # ---- what is answered

    def hold(self, notification: Notification) -> None:
        """Note a call that waits for the daemon."""
        if len(self._held) == HELD_MAX:  # each is of another thread
            self._listener.refuse(notification.id, errno.EAGAIN)
            return
        self._held[notification.id] = notification
        self._any = True
        self._waiting(self._held)

    def answer(self, answer: EventAnswer) -> None:
        """Let a call end, or go on, as the daemon says."""
        notification = self._held.pop(answer.call, None)
        if notification is None:
            return
        error = answer.error
        if not error:
            try:
                self._grant(notification, answer)
            except OSError as failed:
                error = failed.errno or errno.EIO
        if error:
            self._listener.refuse(answer.call, error)
        self._waiting(self._held)

    def abandon(self) -> None:
        """The daemon is gone: nothing will be answered."""
        for call in list(self._held):
            self.answer(EventAnswer(call, errno.EIO))

    def _grant(self, notification: Notification, answer: EventAnswer) -> None:
        if notification.number == NUMBER["perf_event_open"]:
            self._give(notification, answer.name)
        elif notification.number == NUMBER["mmap"]:
            self._listener.proceed(notification.id)
        elif self._listener.is_valid(notification.id):
            if notification.arguments[1] & 0xFFFFFFFF == ID:
                _write(notification.tid, notification.arguments[2], struct.pack("<Q", answer.value))
            self._listener.complete(notification.id, 0)

    def _give(self, notification: Notification, name: str) -> None:
        """Open an event's file, so that it is closed in any case, and give it to the process.

        Direct I/O has each read(2) become a request of its size, whereas what is mapped are pages that are kept.
        """
        fd = os.open(self._directory / name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.lseek(fd, FAR, os.SEEK_SET)
            closes = os.O_CLOEXEC if notification.arguments[4] & _FLAG_CLOEXEC else 0
            self._listener.give(notification.id, fd, closes)
        finally:
            os.close(fd)


def _read(tid: int, address: int, size: int) -> bytes:
    data = read_memory(tid, address, size)
    if len(data) < size:
        raise Refused(errno.EFAULT)
    return data


def _write(tid: int, address: int, data: bytes) -> None:
    memory = os.open(f"/proc/{tid}/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(memory, data, address)
    except (OSError, OverflowError):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from None
    finally:
        os.close(memory)
