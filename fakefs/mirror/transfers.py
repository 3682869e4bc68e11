"""Calls on open files: read(2), write(2) and the like, of the same sizes, on files that the guest opens for them.

The files are opened when they are first used, by their path on the host, under the same descriptor number where that
is free. What has no path (pipes, sockets, terminals) is /dev/null: never blocks, takes everything and gives nothing.
"""

from __future__ import annotations

import os

from emulator.agent import WINDOW_FD
from fakefs.mirror.calls import NUMBER
from fakefs.mirror.filecalls import ANSWER, ANSWER_SIZE
from fakefs.mirror.guestpaths import GuestPaths, place
from fakefs.mirror.processes import Mirrored, OpenFile, Processes
from fakefs.mirror.records import Transfer
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_MOVES = frozenset(NUMBER[name] for name in ("read", "write", "getdents64"))


class Transfers:
    """Makes them."""

    def __init__(self, shadows: Shadows, processes: Processes, paths: GuestPaths) -> None:
        self._pump = shadows.pump
        self._processes = processes
        self._paths = paths

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
            if file is None or file.path != record.file.text:
                file = await self._open(shadow, record, file)
            if file is not None:
                await self._transfer(shadow, record, file)

    async def _open(self, shadow: Mirrored, record: Transfer, old: OpenFile | None) -> OpenFile | None:
        path = record.file.text
        calls = [] if old is None else [(Sys.CLOSE, old.fd)]
        shadow.files.pop(record.fd, None)
        # /dev of mirrored processes is the guest's. A directory is not opened for writing, a file is for both.
        for flags in (os.O_RDWR, os.O_RDONLY):
            wish = (Sys.OPENAT, AT_FDCWD, os.fsencode(path or "/dev/null"), flags | os.O_NONBLOCK | os.O_NOCTTY, 0)
            [*_, fd] = await self._pump.call(shadow.task, [*calls, *place(self._pump.agent, shadow.task, [wish])])
            calls = []
            if fd >= 0:
                break
        else:
            return None
        taken = {WINDOW_FD, *shadow.descriptors.values(), *(file.fd for file in shadow.files.values())}
        if fd != record.fd < WINDOW_FD and record.fd not in taken:
            await self._pump.call(shadow.task, [(Sys.DUP2, fd, record.fd), (Sys.CLOSE, fd)])
            fd = record.fd
        file = shadow.files[record.fd] = OpenFile(path, fd, 0)
        return file

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
