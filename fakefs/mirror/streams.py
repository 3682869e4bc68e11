"""Pipes, named pipes and terminals of mirrored processes, in the guest: what a call can block on.

There is one in the guest for each that is used on the host, made when it is first used: by name, for nobody knows the
numbers that pipe(2) will give. The guest's init keeps it open, for reading and writing, until a call has waited for its
end; others open it by way of that descriptor.
"""

from __future__ import annotations

import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from emulator.agent import OTHER_ROOT
from fakefs.mirror.guestpaths import Wish, place
from fakefs.mirror.mirrored import Mirrored
from fakefs.mirror.records import PathArgument
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_KEPT_MAX = 64
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441  # <asm-generic/ioctls.h>
_AT = 0x100  # where numbers are answered in init's data area
_DRAIN, _DRAINED = 0x4000, 4  # bytes, at a time, and how often


def is_stream(file: PathArgument) -> bool:
    """Is what a record says of an open file a pipe, named or not, or a terminal?"""
    return file.text.startswith(("pipe:", "/dev/")) or bool(file.entries and stat.S_ISFIFO(file.entry.mode))


class Streams:
    """All of them."""

    def __init__(self, shadows: Shadows) -> None:
        self._shadows = shadows
        self._kept: OrderedDict[str, int] = OrderedDict()  # init's descriptors
        self._masters: dict[str, int] = {}
        self._mounted = False

    async def path(self, file: PathArgument) -> bytes:
        """Return a path of the guest at which one can be opened; b"" when it cannot be had."""
        fd = self._kept.get(file.text)
        if fd is None:
            if len(self._kept) >= _KEPT_MAX:
                await self._drop(next(iter(self._kept)))
            fd = await self._keep(file)
            if fd < 0:
                return b""
            self._kept[file.text] = fd
        self._kept.move_to_end(file.text)
        return b"/proc/1/fd/%d" % fd

    def ending(self, file: PathArgument, *, reads: bool) -> Callable[[], Awaitable[None]]:
        """Return what lets a call go on that is blocked, when it has gone on on the host.

        A read has found an end or got what nobody wrote here; a write has found room.
        """

        async def end() -> None:
            if file.text in self._masters:
                await (self._type(file.text) if reads else self._drain(self._masters[file.text]))
            elif reads:
                await self._drop(file.text)
            elif file.text in self._kept:
                await self._drain(self._kept[file.text])

        return end

    async def _keep(self, file: PathArgument) -> int:
        if file.text.startswith("/dev/"):
            return await self._new_terminal(file.text)
        if file.entries:
            return await self._open(OTHER_ROOT + os.fsencode(file.text))
        for shadow in self._shadows.all():
            if isinstance(shadow, Mirrored):
                for each in shadow.files.values():
                    if each.path == file.text:
                        return await self._open(b"/proc/%d/fd/%d" % (shadow.task.pid, each.fd))
        [result] = await self._init((Sys.PIPE2, self._at, 0))
        if result < 0:
            return result
        reading, writing = struct.unpack("<ii", self._shadows.pump.agent.get(self._shadows.init.task, _AT, 8))
        fd = await self._open(b"/proc/self/fd/%d" % reading)
        await self._init((Sys.CLOSE, reading), (Sys.CLOSE, writing))
        return fd

    async def _new_terminal(self, name: str) -> int:
        """Make a pseudoterminal, of which nobody but init has the other end."""
        if not self._mounted:
            self._mounted = True
            await self._init((Sys.MKDIRAT, AT_FDCWD, b"/dev/pts", 0o755))
            await self._init((Sys.MOUNT, b"devpts", b"/dev/pts", b"devpts", 0, 0))
        master = await self._open(b"/dev/ptmx")
        self._shadows.pump.agent.put(self._shadows.init.task, _AT, bytes(4))
        [_, fd] = await self._init(
            (Sys.IOCTL, master, _TIOCSPTLCK, self._at), (Sys.IOCTL, master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
        )
        if fd < 0:
            await self._init((Sys.CLOSE, master))
        else:
            self._masters[name] = master
        return fd

    async def _drop(self, name: str) -> None:
        fds = [self._kept.pop(name, -1), self._masters.pop(name, -1)]
        await self._init(*((Sys.CLOSE, fd) for fd in fds))

    async def _drain(self, fd: int) -> None:
        at = self._shadows.init.task.virtual(0)
        await self._init(*[(Sys.READ, fd, at, _DRAIN)] * _DRAINED)

    async def _type(self, name: str) -> None:
        await self._init((Sys.WRITE, self._masters[name], b"\n", 1))

    async def _open(self, path: bytes) -> int:
        [fd] = await self._init((Sys.OPENAT, AT_FDCWD, path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY, 0))
        return fd

    @property
    def _at(self) -> int:
        return self._shadows.init.task.virtual(_AT)

    async def _init(self, *calls: Wish) -> list[int]:
        init, pump = self._shadows.init, self._shadows.pump
        async with init.lock:
            return await pump.call(init.task, place(pump.agent, init.task, calls))
