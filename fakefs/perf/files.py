"""The files of the mount with those of perf events among them, which have no directory that shows them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from fakefs.files import Caller, Files, Interrupt, OpenFile, Stat
from fakefs.perf.events import Event, Events
from fakefs.perf.requests import FAR
from fakefs.perf.ring import TAIL

_ENDLESS = 1 << 62
_PAGE = 4096


class EventFiles:
    """Implements `fakefs.files.Files` for what is an event; all else is for `files`."""

    def __init__(self, files: Files, events: Events) -> None:
        self._files = files
        self._events = events
        self.watch_attributes = files.watch_attributes
        self.entries = files.entries
        self.mkdir, self.rmdir, self.unlink, self.rename = files.mkdir, files.rmdir, files.unlink, files.rename
        self.link, self.symlink, self.mknod, self.readlink = files.link, files.symlink, files.mknod, files.readlink
        self.chmod, self.chown = files.chmod, files.chown

    def _event(self, path: bytes) -> Event | None:
        return self._events.named(os.fsdecode(os.path.basename(path)))

    async def stat(self, path: bytes) -> Stat:
        if self._event(path) is None:
            return await self._files.stat(path)
        return Stat(stat.S_IFREG | 0o600, 1, 0, 0, _ENDLESS, 0, _PAGE, 0, 0, 0)

    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> OpenFile:
        event = self._event(path)
        if event is None:
            return await self._files.open(caller, path, flags, mode)
        event.token = None
        return event

    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        """read(2) of an event, or of a page that is mapped."""
        if not isinstance(file, Event):
            return await self._files.read(caller, file, offset, size, flags, intr)
        if offset < FAR - 1:
            there = b"" if file.ring is None else bytes(file.ring.contents[offset : offset + size])
            return there.ljust(size, b"\0")
        if offset % _PAGE:
            return await self._events.read(file, caller, size)
        # Not a read(2), but a page of it.
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def write(self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt) -> int:
        """Of an event, a page that the program has written to, as the host's kernel is about to let go of it."""
        if not isinstance(file, Event):
            return await self._files.write(caller, file, offset, data, flags, intr)
        if file.ring is None or offset >= file.length:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if offset == 0 and len(data) == _PAGE:
            file.ring.consume(int.from_bytes(data[TAIL : TAIL + 8], "little"))
        return len(data)

    async def close(self, file: OpenFile) -> None:
        await (self._events.close(file) if isinstance(file, Event) else self._files.close(file))

    async def poll(self, caller: Caller, file: OpenFile, events: int, notify: Callable[[], None] | None) -> int:
        if isinstance(file, Event):
            return await self._events.poll(file, caller, events, notify)
        return await self._files.poll(caller, file, events, notify)

    async def truncate(self, caller: Caller, path: bytes, file: OpenFile | None, size: int) -> None:
        if isinstance(file, Event) or self._event(path) is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await self._files.truncate(caller, path, file, size)
