"""A guest's files as a mount serves them, without FUSE: a request costs 0.1 ms, and nothing sleeps."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from emulator.guest import Guest
from fakefs.daemon import Service, _files
from fakefs.files import Caller
from fakefs.pump import Pump
from fakefs.shadow import Shadows
from fakefs.wprobe.files import WprobeFiles
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Never

_ROOT = Caller(0, 0, 0)


class Served:
    """The files, by names in the tracefs or absolute ones."""

    def __init__(self, files: WprobeFiles, guest: Guest) -> None:
        self.files = files
        self.guest = guest
        self.root = _ROOT
        self.table: Table = files._table

    def _path(self, name: str) -> bytes:
        return os.fsencode(name if name.startswith("/") else f"/sys/kernel/tracing/{name}")

    async def read(self, name: str) -> str:
        """Read a file to its end."""
        file = await self.files.open(_ROOT, self._path(name), os.O_RDONLY)
        data = b""
        while piece := await self.files.read(_ROOT, file, len(data), 1 << 16, os.O_RDONLY, Never()):
            data += piece
        await self.files.close(file)
        return data.decode("latin-1")

    async def write(self, name: str, text: str, *, truncate: bool = False) -> None:
        """Write a line, as `echo TEXT >> NAME` does, or `>`. Raises OSError."""
        flags = os.O_WRONLY | (os.O_TRUNC if truncate else os.O_APPEND)
        if name.startswith("/tmp/"):
            flags |= os.O_CREAT
        file = await self.files.open(_ROOT, self._path(name), flags, 0o600)
        try:
            if text:
                await self.files.write(_ROOT, file, 0, os.fsencode(text) + b"\n", flags & os.O_APPEND, Never())
        finally:
            await self.files.close(file)

    async def enable(self, event: str, on: bool = True) -> None:
        """Write an event's `enable`."""
        await self.write(f"events/{event}/enable", "1" if on else "0")


@asynccontextmanager
async def serving(guest: Guest, wprobe: str) -> AsyncIterator[Served]:
    """Serve a guest as `fakefs mount --deterministic --wprobe=...` does."""
    pump = Pump(guest, deterministic=True)
    async with trio.open_nursery() as nursery:
        shadows = Shadows(pump, nursery)
        files = _files(guest, Service(Path(), wprobe=wprobe), shadows, nursery)
        assert isinstance(files, WprobeFiles)
        nursery.start_soon(pump.run)
        yield Served(files, guest)
        nursery.cancel_scope.cancel()


def serve(guest: Guest, test: Callable[[Served], Awaitable[None]], wprobe: str = "unlimited") -> None:
    """Run a test with a guest's files."""

    async def main() -> None:
        async with serving(guest, wprobe) as served:
            await test(served)

    trio.run(main)
