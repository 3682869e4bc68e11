"""Calls on open files: read(2), write(2) and the like, of the same sizes, on files that the guest opens for them.

The files are opened when they are first used, by their path on the host, under the same descriptor number where that
is free. What has neither path nor name (sockets, what was deleted) is /dev/null: never blocks, takes everything and
gives nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from functools import partial

from emulator.agent import WINDOW_FD
from fakefs.mirror.blocking import LASTING
from fakefs.mirror.calls import F_DUPLICATES, Call, find
from fakefs.mirror.connections import F_SETFL, Connections, is_socket, kind_of
from fakefs.mirror.filecalls import ANSWER
from fakefs.mirror.guestpaths import GuestPaths, Wish, batches, place
from fakefs.mirror.layout import Layout, buffers_size
from fakefs.mirror.mirrored import Mirrored, OpenFile, kind_of_file
from fakefs.mirror.processes import Processes
from fakefs.mirror.records import Descriptors, Opened, Plain, Transfer, Used
from fakefs.mirror.rooms import Rooms
from fakefs.mirror.streams import Streams, is_stream
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_TO_A_NUMBER = frozenset(("dup2", "dup3"))
_OF_SOCKETS = frozenset(
    (
        *("connect", "bind", "listen", "accept", "accept4", "shutdown", "getsockname", "getpeername", "setsockopt"),
        *("getsockopt", "sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg"),
    )
)
_ACCEPTS = frozenset(("accept", "accept4"))
_WAITS = frozenset(("flock", "fcntl", "poll", "ppoll", "select", "pselect6"))
_READS = frozenset(("read", "readv", "pread64", "preadv", "preadv2"))
_MOVES = frozenset(("read", "write", "readv", "writev", "getdents", "getdents64", "lseek"))
_COPIES = {"sendfile": 0, "copy_file_range": 1, "splice": 1}
"""Which of their files they write to."""
_WRITES = frozenset(("write", "writev", "pwrite64", "pwritev", "pwritev2", "fallocate"))
_READS_AND_WRITES = _READS | {"write", "writev"}
_OFFSETS = {"pwrite64": 3, "pwritev": 3, "pwritev2": 3, "fallocate": 2}
"""Which argument says where in the file."""
_CLOSE_RANGE_CLOEXEC = 4
_TIMER = "anon_inode:[timerfd]"
_UNKNOWN = -1


class Transfers:
    """Makes them."""

    def __init__(self, shadows: Shadows, processes: Processes, paths: GuestPaths) -> None:
        self._pump = shadows.pump
        self._processes = processes
        self._paths = paths
        self._rooms = Rooms(shadows.pump)
        self._streams = Streams(shadows)
        self._connections = Connections(shadows)

    async def make(self, record: Transfer) -> None:
        """Make a call by its thread's shadow."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        call = find(record.number, record.arguments).without_path
        if call.name == "close":
            await self._close(shadow, record.files[0])
            return
        await self._paths.make(record.needed, writes=False)
        for at, used in enumerate(record.files):
            await self._paths.make(used.file.entries, writes=call.name in _WRITES or _COPIES.get(call.name) == at)
        async with shadow.lock:
            opened = [await self._opened(shadow, used) for used in record.files]
            files = [file for file in opened if file is not None]
            if call.name == "setsockopt" and record.arguments[1:3] == [socket.SOL_SOCKET, socket.SO_LINGER]:
                return  # it would make close(2) block
            if len(files) < len(opened) or (call.name in _OF_SOCKETS and not files[0].path):
                return
            if call.name in _TO_A_NUMBER or (call.name == "fcntl" and record.arguments[1] in F_DUPLICATES):
                await self._duplicate(shadow, call, record, files[0])
            else:
                await self._transfer(shadow, call, record, files)

    async def _close(self, shadow: Mirrored, used: Used) -> None:
        """close(2); of what a call has returned and nobody has used."""
        file, name = shadow.files.pop(used.fd, None), used.file.text
        fd = -1 if file is None else file.fd
        kind = kind_of(name)
        if file is None and not (kind and any(each.path == name for each in shadow.files.values())):
            fd = shadow.claim(kind) if kind else shadow.claim_file(name, used.flags, used.fd)
        if fd >= 0:
            await self._processes.call(shadow, (Sys.CLOSE, fd))

    async def _opened(self, shadow: Mirrored, used: Used) -> OpenFile | None:
        file = shadow.files.get(used.fd)
        if file is None or not file.is_for(used):
            file = await self._open(shadow, used, file)
        if file is not None and is_socket(used.file):
            file = await self._connections.set_flags(shadow, used, file)
        return file

    async def create(self, record: Plain) -> None:
        """A call that returns a descriptor: socket(2), eventfd(2) and the like."""
        shadow = self._processes.find(record.tid)
        if shadow is not None:
            await self._processes.settle(shadow)
            async with shadow.lock:
                await self._connections.create(shadow, record)

    async def name(self, record: Opened) -> None:
        """Give what a call has returned the descriptors of the host."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        async with shadow.lock:
            claimed = [(used, shadow.claim(kind_of(used.file.text), record.tid)) for used in record.files]
            for used, fd in reversed(claimed):  # the guest has often fewer of them open, so numbers become higher
                if fd >= 0:
                    old = shadow.files.pop(used.fd, None)
                    if old is not None:
                        await self._pump.call(shadow.task, [(Sys.CLOSE, old.fd)])
                    await self._number(shadow, used, fd)

    async def close_range(self, record: Plain) -> None:
        """close_range(2), but for what is open in the guest alone, or under another number than on the host."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        first, last, flags = (each & 0xFFFFFFFF for each in record.arguments)
        if flags & _CLOSE_RANGE_CLOEXEC:
            return
        gone = [shadow.files.pop(fd) for fd in list(shadow.files) if first <= fd <= last]
        kept = {WINDOW_FD, *shadow.descriptors.values(), *(file.fd for file in shadow.files.values())}
        kept.update(each.fd for each in shadow.unclaimed)
        calls: list[Wish] = []
        for each in [*sorted(fd for fd in kept if first <= fd <= last), last + 1]:
            if first < each:
                calls.append((record.number, first, each - 1, 0))
            first = each + 1
        calls += [(Sys.CLOSE, file.fd) for file in gone if not record.arguments[0] <= file.fd <= last]
        async with shadow.lock:
            for part in batches(calls):
                await self._pump.call(shadow.task, place(self._pump.agent, shadow.task, part))

    async def keep(self, record: Descriptors) -> None:
        """Close what the host's process has not got any more."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        gone = shadow.files.keys() - set(record.numbers)
        closing = [(Sys.CLOSE, shadow.files.pop(fd).fd) for fd in gone]
        closing += [(Sys.CLOSE, each.fd) for each in shadow.unclaimed]
        shadow.unclaimed = []
        if closing:
            async with shadow.lock:
                for part in batches(closing):
                    await self._pump.call(shadow.task, place(self._pump.agent, shadow.task, part))

    async def _open(self, shadow: Mirrored, used: Used, old: OpenFile | None) -> OpenFile | None:
        shadow.files.pop(used.fd, None)
        if old is not None:
            await self._pump.call(shadow.task, [(Sys.CLOSE, old.fd)])
        flags = used.flags & (os.O_ACCMODE | os.O_APPEND)
        if kind_of(used.file.text):
            fd = await self._connections.open(shadow, used.file.text)
        elif (waiting := shadow.claim_file(used.file.text, used.flags, used.fd)) >= 0:
            fd = waiting
        elif is_stream(used.file):
            path = await self._streams.path(used.file)
            fd = await self._open_at(shadow, path, flags | used.flags & os.O_NONBLOCK)
        else:
            fd = await self._open_at(shadow, os.fsencode(used.file.text), flags | os.O_NONBLOCK)
        if fd < 0:  # /dev of mirrored processes is the guest's
            fd = await self._open_at(shadow, b"/dev/null", os.O_RDWR)
        return None if fd < 0 else await self._number(shadow, used, fd)

    async def _number(self, shadow: Mirrored, used: Used, fd: int) -> OpenFile:
        """Have an open file of the guest stand for one of the host's, under its number if that is free."""
        flags = used.flags & (os.O_ACCMODE | os.O_APPEND)
        for at, waiting in enumerate(shadow.unclaimed):
            if waiting.fd == used.fd:
                [other] = await self._pump.call(shadow.task, [(Sys.DUP, waiting.fd)])
                shadow.unclaimed[at] = waiting._replace(fd=other)
        if fd != used.fd and self._is_free(shadow, used.fd):
            await self._pump.call(shadow.task, [(Sys.DUP2, fd, used.fd), (Sys.CLOSE, fd)])
            fd = used.fd
        file = shadow.files[used.fd] = OpenFile(used.file.text, flags, fd, 0)
        return file

    async def _open_at(self, shadow: Mirrored, path: bytes, flags: int) -> int:
        if not path:
            return -errno.ENOENT
        wish = (Sys.OPENAT, AT_FDCWD, path, flags | os.O_NOCTTY, 0)
        return (await self._pump.call(shadow.task, place(self._pump.agent, shadow.task, [wish])))[0]

    @staticmethod
    def _is_free(shadow: Mirrored, fd: int) -> bool:
        taken = {*shadow.descriptors.values(), *(file.fd for file in shadow.files.values())}
        taken.update(each.fd for each in shadow.unclaimed)
        return 0 <= fd < WINDOW_FD and fd not in taken

    async def _duplicate(self, shadow: Mirrored, call: Call, record: Transfer, file: OpenFile) -> None:
        """dup(2) and the like: what number the host gives is seen when it is used, but for dup2(2)."""
        words = record.arguments[1:]
        if call.name not in _TO_A_NUMBER:
            [fd] = await self._pump.call(shadow.task, [(record.number, file.fd, *words)])
            closing: list[Sequence[int]] = [(Sys.CLOSE, fd)]
            if fd >= 0 and not kind_of(file.path):  # those without a path have no name to be known by
                closing = shadow.opened(kind_of_file(file.path, file.flags), fd)
            if fd >= 0 and closing:
                await self._pump.call(shadow.task, closing)
            return
        new = words[0]
        old = shadow.files.pop(new, None)
        if old is not None and old.fd != new:
            await self._pump.call(shadow.task, [(Sys.CLOSE, old.fd)])
        if (old is not None and old.fd == new) or self._is_free(shadow, new):
            [fd] = await self._pump.call(shadow.task, [(record.number, file.fd, *words)])
            if fd >= 0:
                shadow.files[new] = file._replace(fd=new)

    async def _transfer(self, shadow: Mirrored, call: Call, record: Transfer, files: list[OpenFile]) -> None:
        fds = {used.fd: file.fd for used, file in zip(record.files, files, strict=True)}
        room = await self._rooms.of(shadow, buffers_size(record), written=call.name in _WRITES)
        layout = Layout(call, record, fds, room)
        self._pump.agent.put(shadow.task, LASTING, bytes(layout.structures))
        self._pump.agent.put(shadow.task, ANSWER, bytes(layout.buffers))
        seeks = []
        if call.name in _MOVES or call.name in _COPIES:
            for used, file in zip(record.files, files, strict=True):
                if _has_position(used, file) and file.position != used.position:
                    seeks.append((Sys.LSEEK, file.fd, used.position, os.SEEK_SET))
        calls = [*seeks, (record.number, *layout.words)]
        returned = partial(self._returned, shadow, call, record, files)
        if call.name in _WAITS or not all(_is_plain(used) for used in record.files):
            first = record.files[0].file if record.files else None
            ending = None
            if call.name in _READS_AND_WRITES and first is not None and is_stream(first):
                ending = self._streams.ending(first, reads=call.name in _READS)
            elif call.name in _READS and first is not None and first.text == _TIMER:
                ending = partial(self._processes.blocking.catch_up, shadow)
            await self._processes.blocking.begin(shadow, calls, ending, returned, limit=timeout(call, record))
        else:
            returned(await self._pump.call(shadow.task, calls))

    def _returned(
        self, shadow: Mirrored, call: Call, record: Transfer, files: list[OpenFile], results: list[int]
    ) -> None:
        """Note what a call has done to the guest's files."""
        result = results[-1]
        if call.name in _ACCEPTS:
            self._connections.accepted(shadow, files[0], result)
        if call.name == "fcntl" and record.arguments[1] == F_SETFL and result == 0:
            flags = files[0].flags & os.O_ACCMODE | record.arguments[2] & (os.O_APPEND | os.O_NONBLOCK)
            shadow.files[record.files[0].fd] = files[0]._replace(flags=flags)
        if call.name in _MOVES and _has_position(record.files[0], files[0]):
            used, file = record.files[0], files[0]
            position = (0 if call.name == "lseek" else used.position) + max(result, 0)
            shadow.files[used.fd] = file._replace(position=position)
        written = 0 if call.name in _WRITES else _COPIES.get(call.name)
        if call.name in _COPIES:
            for used, file in zip(record.files, files, strict=True):
                shadow.files[used.fd] = file._replace(position=_UNKNOWN)
        if written is not None and result >= 0 and _has_position(record.files[written], files[written]):
            start = record.arguments[_OFFSETS[call.name]] if call.name in _OFFSETS else record.files[written].position
            size = record.arguments[3] if call.name == "fallocate" else result
            self._paths.written(files[written].path, start, size)


def timeout(call: Call, record: Transfer) -> float | None:
    """Return how long a call waits at most, in seconds; None if that is not limited."""
    parts = iter(record.parts)
    for letter, value in zip(call.arguments, record.arguments, strict=False):
        if letter == "w":
            return value / 1e3 if 0 <= value < 1 << 31 else None
        part = next(parts, None) if value and letter not in "Oicwn" else None
        if part is not None and letter in "tu":
            seconds, rest = struct.unpack("<qq", part.data.encode("latin-1").ljust(16, b"\0")[:16])
            return float(seconds + rest / (1e9 if letter == "t" else 1e6))
    return None


def _is_plain(used: Used) -> bool:
    """Can a call on a file not block?"""
    return not kind_of(used.file.text) and not is_stream(used.file)


def _has_position(used: Used, file: OpenFile) -> bool:
    """Is it a regular file or a directory, and open in the guest?"""
    return bool(file.path) and _is_plain(used)
