"""Calls on open files: read(2), write(2) and the like, of the same sizes, on files that the guest opens for them.

The files are opened when they are first used, by their path on the host, under the same descriptor number where that
is free. What has neither path nor name (sockets, what was deleted) is /dev/null: never blocks, takes everything and
gives nothing.
"""

from __future__ import annotations

import errno
import os

from emulator.agent import WINDOW_FD
from fakefs.mirror.calls import NUMBER
from fakefs.mirror.connections import Connections
from fakefs.mirror.filecalls import ANSWER, ANSWER_SIZE
from fakefs.mirror.guestpaths import GuestPaths, batches, place
from fakefs.mirror.processes import Mirrored, OpenFile, Processes
from fakefs.mirror.records import Descriptors, Plain, Transfer
from fakefs.mirror.streams import Streams, is_stream
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_TO_A_NUMBER = frozenset(NUMBER[name] for name in ("dup2", "dup3"))
_OF_SOCKETS = frozenset(
    NUMBER[name] for name in ("connect", "bind", "listen", "accept", "accept4", "sendto", "recvfrom", "shutdown")
)
_DUPLICATES = _TO_A_NUMBER | {NUMBER["dup"], NUMBER["fcntl"]}
_MOVES = frozenset(NUMBER[name] for name in ("read", "write", "getdents64"))


class Transfers:
    """Makes them."""

    def __init__(self, shadows: Shadows, processes: Processes, paths: GuestPaths) -> None:
        self._pump = shadows.pump
        self._processes = processes
        self._paths = paths
        self._streams = Streams(shadows)
        self._connections = Connections(shadows, processes)

    async def make(self, record: Transfer) -> None:
        """Make a call by its thread's shadow."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        file = shadow.files.get(record.fd)
        if record.number == NUMBER["close"]:
            if file is not None:
                del shadow.files[record.fd]
                await self._processes.call(shadow, (Sys.CLOSE, file.fd))
            return
        await self._paths.make(record.file.entries, writes=record.number in (NUMBER["write"], NUMBER["pwrite64"]))
        async with shadow.lock:
            if file is None or not file.is_for(record):
                file = await self._open(shadow, record, file)
            if file is not None and record.file.text.startswith("socket:"):
                file = await self._connections.set_flags(shadow, record, file)
            if file is not None and record.number in _OF_SOCKETS:
                if file.path:
                    await self._connections.make(shadow, record, file)
            elif file is not None and record.number in _DUPLICATES:
                await self._duplicate(shadow, record, file)
            elif file is not None:
                await self._transfer(shadow, record, file)

    async def create_socket(self, record: Plain) -> None:
        """socket(2)."""
        shadow = self._processes.find(record.tid)
        if shadow is not None:
            await self._processes.settle(shadow)
            async with shadow.lock:
                domain, kind, protocol = record.arguments
                fd = await self._connections.create(shadow, domain, kind, protocol)
                await self._connections.keep(shadow, domain, kind, fd)

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

    async def _open(self, shadow: Mirrored, record: Transfer, old: OpenFile | None) -> OpenFile | None:
        shadow.files.pop(record.fd, None)
        if old is not None:
            await self._pump.call(shadow.task, [(Sys.CLOSE, old.fd)])
        flags = record.flags & (os.O_ACCMODE | os.O_APPEND)
        if record.file.text.startswith("socket:"):
            fd = await self._connections.open(shadow, record.file.text)
        elif is_stream(record.file):
            path = await self._streams.path(record.file)
            fd = await self._open_at(shadow, path, flags | record.flags & os.O_NONBLOCK)
        else:
            fd = await self._open_at(shadow, os.fsencode(record.file.text), flags | os.O_NONBLOCK)
        if fd < 0:  # /dev of mirrored processes is the guest's
            fd = await self._open_at(shadow, b"/dev/null", os.O_RDWR)
        if fd < 0:
            return None
        if fd != record.fd and self._is_free(shadow, record.fd):
            await self._pump.call(shadow.task, [(Sys.DUP2, fd, record.fd), (Sys.CLOSE, fd)])
            fd = record.fd
        file = shadow.files[record.fd] = OpenFile(record.file.text, flags, fd, 0)
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

    async def _duplicate(self, shadow: Mirrored, record: Transfer, file: OpenFile) -> None:
        """dup(2) and the like: what number the host gives is seen when it is used, but for dup2(2)."""
        words = [word or 0 for word in record.arguments]
        if record.number not in _TO_A_NUMBER:
            [fd] = await self._pump.call(shadow.task, [(record.number, file.fd, *words)])
            await self._pump.call(shadow.task, [(Sys.CLOSE, fd)])
            return
        new = words[0]
        old = shadow.files.pop(new, None)
        if old is not None and old.fd != new:
            await self._pump.call(shadow.task, [(Sys.CLOSE, old.fd)])
        if (old is not None and old.fd == new) or self._is_free(shadow, new):
            [fd] = await self._pump.call(shadow.task, [(record.number, file.fd, *words)])
            if fd >= 0:
                shadow.files[new] = file._replace(fd=new)

    async def _transfer(self, shadow: Mirrored, record: Transfer, file: OpenFile) -> None:
        size = min(record.arguments[1] or 0, ANSWER_SIZE) if len(record.arguments) > 1 else 0
        data = record.data.encode("latin-1")[:size]
        self._pump.agent.put(shadow.task, ANSWER, data + bytes(size - len(data) if data else 0))
        at = shadow.task.virtual(ANSWER)
        has_buffer = None in record.arguments
        words = [at if word is None else word for word in record.arguments]
        if has_buffer and len(words) > 1:
            words[1] = size
        calls = [(record.number, file.fd, *words)]
        if record.file.text.startswith("socket:"):
            await self._processes.blocking.begin(shadow, calls)
            return
        if is_stream(record.file):
            ending = self._streams.ending(record.file, reads=record.number == NUMBER["read"])
            await self._processes.blocking.begin(shadow, calls, ending)
            return
        if file.path and file.position != record.position and record.number in _MOVES:
            calls.insert(0, (Sys.LSEEK, file.fd, record.position, os.SEEK_SET))
        results = await self._pump.call(shadow.task, calls)
        position = record.position
        if record.number == NUMBER["lseek"]:
            position = max(results[-1], 0)
        elif record.number in _MOVES:
            position += max(results[-1], 0)
        if data and file.path and results[-1] > 0:
            start = position - results[-1] if record.number in _MOVES else record.arguments[-1] or 0
            self._paths.written(file.path, start, results[-1])
        shadow.files[record.fd] = file._replace(position=position)
