"""What is written to dynamic_events and kprobe_events where wprobes are concerned."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from emulator.errors import EmulatorError
from fakefs.files import Caller
from fakefs.static import TRACEFS
from fakefs.wprobe import commands, definition
from fakefs.wprobe.errorlog import parse
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.structs import GuestStructs, GuestSymbols
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Never, Role, Writing
from fakefs.wprobe.wprobe import Wprobe

if TYPE_CHECKING:
    from fakefs.wprobe.files import WprobeFiles


class DynamicEvents:
    """Defines and removes wprobes; other lines go to the guest."""

    def __init__(self, files: WprobeFiles, table: Table, symbols: GuestSymbols, structs: GuestStructs) -> None:
        self._files = files
        self._table = table
        self._symbols = symbols
        self._structs = structs

    def concern(self, data: bytes) -> bool:
        """Is there a line about wprobes in what is written to dynamic_events?"""
        lines = [line.strip() for line in data.split(b"\n")]
        removal = any(line[:1] in (b"-", b"!") for line in lines) and bool(self._table.wprobes)
        return removal or any(line[:1] == b"w" for line in lines)

    async def write(self, writing: Writing, data: bytes) -> None:
        """Do what is written, line by line. Raises OSError at the first line that is refused."""
        await self._files.drop_stale()
        try:
            for line in commands.lines(data):
                if commands.is_wprobe(line):
                    await self._define(writing, line)
                elif not await self._remove(writing, line):
                    await self._files.to_guest(writing, line)
        except ProbeError as error:
            raise await self._files.logs.refuse(writing, error) from None

    async def _define(self, writing: Writing, line: str) -> None:
        per_cpu = "this_cpu_" not in line or "this_cpu_read(" in await self._files.guest_text(TRACEFS + b"/README")
        wanted = definition.parse(line, self._symbols, self._structs, extended=not self._table.strict, per_cpu=per_cpu)
        if self._table.find(wanted.group, wanted.event):
            raise wanted.taken(by_wprobe=True)
        if await self._files.exists(TRACEFS + f"/events/{wanted.group}/{wanted.event}".encode()):
            raise wanted.taken(by_wprobe=False)
        if not wanted.dummy and self._table.off_limits(wanted.address, wanted.length):
            raise wanted.off_limits()
        carrier = wanted.carrier()
        try:
            await self._files.to_guest(writing, carrier)
        except OSError as error:
            log = parse(await self._files.guest_text(TRACEFS + b"/error_log"))
            if log:  # the guest's parser has said what is wrong with the carrier: the same is wrong with the wprobe
                await self._files.logs.adopt(writing.file.path, carrier, wanted.map_entry(log[-1].entry))
            raise OSError(error.errno, error.strerror) from None
        try:
            self._table.add(wanted, None if wanted.dummy else wanted.address)
        except EmulatorError as error:
            raise OSError(errno.EIO, str(error)) from None

    async def _remove(self, writing: Writing, line: str) -> bool:
        """Remove wprobes if the line says so; False when it is about something else."""
        removal = commands.parse_removal(line)
        if removal is None:
            return False
        doomed = [wprobe for wprobe in self._table.wprobes if removal.matches(wprobe.definition)]
        if any(self._table.is_busy(wprobe) for wprobe in doomed):
            raise ProbeError(errno.EBUSY)
        for wprobe in doomed:
            await self._remove_one(writing, wprobe)
        return bool(doomed)

    async def _remove_one(self, writing: Writing, wprobe: Wprobe) -> None:
        self._table.remove(wprobe)
        try:
            await self._files.to_guest(writing, f"-:{wprobe.definition.group}/{wprobe.definition.event}")
        except OSError:
            self._table.wprobes.append(wprobe)
            raise

    # ---- opening with O_TRUNC

    async def remove_all(self) -> None:
        """The guest is about to remove all events. Raises OSError (EBUSY), with nothing done, when a wprobe is busy."""
        await self._files.drop_stale()
        wprobes = list(self._table.wprobes)
        if any(self._table.is_busy(wprobe) for wprobe in wprobes):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        for wprobe in wprobes:
            self._table.remove(wprobe)

    async def remove_kprobes(self, caller: Caller, path: bytes) -> None:
        """Remove all kprobes but the carriers, which the guest would remove too. Raises OSError."""
        file = await self._files.open_text(caller, path, os.O_RDWR | os.O_APPEND, Role.KPROBE_EVENTS)
        try:
            lines = (await self._files.guest_text(path)).splitlines()
            shown = [line for line in lines if self._files.shown.event_line(line, False)]
            names = dict.fromkeys(line.split(" ", 1)[0].partition(":")[2] for line in shown)
            for name in names:
                enabled = await self._files.guest_text(TRACEFS + f"/events/{name}/enable".encode())
                if enabled.strip() != "0":
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            for name in names:
                await self._files.to_guest(Writing(caller, file, os.O_APPEND, Never()), f"-:{name}")
        finally:
            await self._files.close(file)
