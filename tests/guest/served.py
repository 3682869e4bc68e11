"""A guest's files as a mount serves them, without FUSE: a request costs 0.1 ms, and nothing sleeps."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from emulator.guest import Guest
from fakefs.daemon import Service, make_files
from fakefs.files import Caller
from fakefs.pump import Pump
from fakefs.shadow import Shadows
from fakefs.wprobe.files import WprobeFiles
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Never

_ROOT = Caller(0, 0, 0)
_HIT = re.compile(r" *\S+-\d+ +\[\d+\] \S+ +[\d.]+: (\w+): \((\S+)\) ?(.*)")


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
        files = make_files(guest, Service(Path(), wprobe=wprobe), shadows, nursery)
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


# ---- what tests of wprobes do


async def define(tracefs: Served, *lines: str) -> None:
    """Write lines to dynamic_events."""
    for line in lines:
        await tracefs.write("dynamic_events", line)


async def hits(tracefs: Served, event: str) -> list[dict[str, str]]:
    """The arguments of an event's records."""
    found = [_HIT.fullmatch(line) for line in (await tracefs.read("trace")).splitlines()]
    records = [match[3] for match in found if match and match[1] == event]
    return [dict(word.split("=", 1) for word in record.split()) for record in records]


async def touch(tracefs: Served, *names: str) -> None:
    """Truncate files in the guest's /tmp, which have to be there: do_truncate() is called with their dentries."""
    for name in names:
        await tracefs.write(f"/tmp/{name}", "", truncate=True)


async def make(tracefs: Served, *names: str) -> None:
    """Make files in the guest's /tmp."""
    for name in names:
        await tracefs.write(f"/tmp/{name}", "x")


async def object_watch(tracefs: Served, head: str = "w:watch", option: str = "") -> None:
    """Have the dentries watched whose files are truncated, by a trigger on a kprobe."""
    await define(tracefs, f"{head} rw@-1:8 a=$addr", "p:te do_truncate dentry=$arg2", "p:tc vfs_fallocate file=$arg1")
    await tracefs.write("events/kprobes/te/trigger", f"set_wprobe:watch:dentry{option}")


async def watched(tracefs: Served) -> str:
    """What the line of `watch` in dynamic_events says it watches."""
    [line] = [line for line in (await tracefs.read("dynamic_events")).splitlines() if "/watch " in line]
    return line.split("@")[1].split(":")[0]
