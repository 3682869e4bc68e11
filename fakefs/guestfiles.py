"""The guest's files as the FUSE layer asks for them: what is opened, read and written, by the caller's shadow."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import trio

from emulator.agent import Call
from fakefs.files import Caller, Interrupt, OpenFile
from fakefs.guestnames import BUFFER, BUFFER_SIZE, PATH, GuestNames, check_path
from fakefs.guestpoll import Polling
from fakefs.hostfiles.bring import HostFiles
from fakefs.hostfiles.definitions import takes_uprobes
from fakefs.shadow import Handle, Shadows
from fakefs.static import TRACEFS
from fakefs.syscalls import AT_FDCWD, Sys, check

READ_MAX = BUFFER_SIZE
_F_SETFL = 4
_PAGE = 4096
_RAW = (b"trace_pipe", b"trace_pipe_raw", b"snapshot_raw")
# Flags fcntl(2) can change while a file is open.
_LIVE_FLAGS = os.O_NONBLOCK | os.O_APPEND


class GuestFile:
    """An open file of the guest. Shadows have or get a descriptor of it; `position` is where the guest's is."""

    __slots__ = (
        "end",
        "flags",
        "handle",
        "is_text",
        "live_flags",
        "long",
        "path",
        "polling",
        "position",
        "seekable",
    )

    def __init__(self, handle: Handle, path: bytes, flags: int, seekable: bool) -> None:
        self.handle = handle
        self.path = path
        self.flags = flags
        self.live_flags = flags & _LIVE_FLAGS
        self.seekable = seekable
        self.is_text = seekable and path.startswith(TRACEFS) and not path.endswith(_RAW)
        self.long = False  # more than the pages of one request have been there so far
        self.end: int | None = None  # where the guest has said that the text ends
        self.position = 0
        self.polling: Polling | None = None


class GuestFiles(GuestNames):
    """Implements `fakefs.files.Files`."""

    def __init__(
        self, shadows: Shadows, nursery: trio.Nursery, is_static: Callable[[bytes], bool] = lambda path: False
    ) -> None:
        super().__init__(shadows, is_static)
        self._nursery = nursery
        self.host_files = HostFiles(shadows)
        self._seekable: dict[bytes, bool] = {}

    # ---- open files

    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> GuestFile:
        """open(2) by the caller's shadow."""
        check_path(path)
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            self._agent.put(shadow.task, PATH, path + b"\0")
            call = (Sys.OPENAT, AT_FDCWD, shadow.task.virtual(PATH), flags, mode)
            fd = check((await self._pump.call(shadow.task, [call]))[0])
            seekable = self._seekable.get(path)
            if seekable is None:
                [result] = await self._pump.call(shadow.task, [(Sys.LSEEK, fd, 0, os.SEEK_CUR)])
                seekable = result != -errno.ESPIPE
                if self._is_static(path):
                    self._seekable[path] = seekable
            handle = Handle(caller.tid)
            shadow.descriptors[handle] = fd
        return GuestFile(handle, path, flags, seekable)

    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        """read(2) by the caller's shadow, at `offset`; a signal to the caller ends it with EINTR.

        A text is read on to its end, or as far as `size` goes, without the guest doing anything else in between. Each
        request wakes the shadow and lets it sleep, which are events; a reader of `trace` that made one read(2) a
        request would never get to the end of a trace that has them.
        """
        assert isinstance(file, GuestFile)
        if file.end == offset and offset:
            file.end = None
            return b""
        shadow = await self._shadows.of(caller)
        size = min(size, READ_MAX)
        async with shadow.lock:
            fd = await self._shadows.descriptor(shadow, file.handle)
            before = self._before(file, fd, offset, flags)
            pieces = self._read_sizes(file, size)
            at = shadow.task.virtual(BUFFER)
            reads = [(Sys.READ, fd, at + index * pieces[0], piece) for index, piece in enumerate(pieces)]
            results = await self._shadows.read_interruptibly(shadow, [*before, *reads], intr, holds_clock=file.is_text)
            if before:
                check(results[len(before) - 1])
            results = results[len(before) :]
            check(results[0])
            data = b"".join(
                self._agent.get(shadow.task, BUFFER + index * pieces[0], min(got, piece))
                for index, (got, piece) in enumerate(zip(results, pieces, strict=True))
                if got > 0
            )
            file.position = offset + len(data)
            file.end = file.position if len(results) > 1 and results[-1] == 0 else None
            file.long = results[-1] > 0
            return data

    def _read_sizes(self, file: GuestFile, size: int) -> list[int]:
        """Divide a read: one piece for what may block, two for a text of one page, more once it proves longer."""
        if size < 2 * _PAGE or not file.is_text:
            return [size]
        return [_PAGE] * (size // _PAGE if file.long else 2)

    async def write(self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt) -> int:
        """write(2) by the caller's shadow; what does not fit a slot goes in pieces that end at line ends."""
        assert isinstance(file, GuestFile)
        directory = await self.host_files.bring_named(caller, data) if takes_uprobes(file.path) else None
        shadow = await self._shadows.of(caller)
        written = 0
        async with shadow.lock:
            fd = await self._shadows.descriptor(shadow, file.handle)
            enter, leave = self.host_files.visit(shadow, directory)
            for piece in _pieces(data):
                # An offset means nothing to a tracefs; O_APPEND descriptors come with the host's idea of the size.
                at = file.position if flags & os.O_APPEND else offset + written
                before = self._before(file, fd, at, flags)
                self._agent.put(shadow.task, BUFFER, piece)
                calls = [*before, *enter, (Sys.WRITE, fd, shadow.task.virtual(BUFFER), len(piece)), *leave]
                result = (await self._pump.call(shadow.task, calls))[len(before) + len(enter)]
                if result < 0 and written:
                    break
                file.position = at + check(result)
                written += result
                if result < len(piece):
                    break
        if self._shadows.watching is not None:
            await self._shadows.watching.uprobes_changed(caller.tid)
        return written

    def _before(self, file: GuestFile, fd: int, offset: int, flags: int) -> list[Call]:
        """What must be done before a read or write: follow the descriptor's flags and its offset."""
        calls: list[Call] = []
        live = flags & _LIVE_FLAGS
        if live != file.live_flags:
            file.live_flags = live
            calls.append((Sys.FCNTL, fd, _F_SETFL, file.flags & ~_LIVE_FLAGS & ~os.O_TRUNC | live))
        if file.seekable and offset != file.position:
            calls.append((Sys.LSEEK, fd, offset, os.SEEK_SET))
        return calls

    async def close(self, file: OpenFile) -> None:
        """close(2)."""
        assert isinstance(file, GuestFile)
        if file.polling is not None:
            await file.polling.close()
        await self._shadows.close(file.handle)

    async def poll(self, caller: Caller, file: OpenFile, events: int, notify: Callable[[], None] | None) -> int:
        """poll(2): what is ready now; otherwise `notify` is called once when something becomes so."""
        assert isinstance(file, GuestFile)
        if file.polling is None:
            file.polling = Polling(self._shadows, self._nursery, file.handle)
        return await file.polling.ready(caller, events, notify)

    async def truncate(self, caller: Caller, path: bytes, file: OpenFile | None, size: int) -> None:
        """truncate(2), or ftruncate(2) of an open file."""
        if isinstance(file, GuestFile):
            shadow = await self._shadows.of(caller)
            async with shadow.lock:
                fd = await self._shadows.descriptor(shadow, file.handle)
                [result] = await self._pump.call(shadow.task, [(Sys.FTRUNCATE, fd, size)])
            self._kept.pop(path, None)
            check(result)
        else:
            await self._by_path(caller, path, None, lambda at, _: (Sys.TRUNCATE, at, size))


def _pieces(data: bytes) -> Iterator[bytes]:
    """Divide what is written into pieces that fit a slot, at line ends where there are any."""
    if not data:
        yield data
    while data:
        size = len(data)
        if size > BUFFER_SIZE:
            size = data.rfind(b"\n", 0, BUFFER_SIZE) + 1 or BUFFER_SIZE
        yield data[:size]
        data = data[size:]
