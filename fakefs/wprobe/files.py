"""The files of a tracefs with wprobes in them, on a guest whose kernel has none.

The guest's own files are served as they are but for a few, whose text is rewritten (`shown`): dynamic_events and the
trigger files say `w:` and `set_wprobe` where the guest has carriers and enable_event triggers, kprobe files say nothing
of them, error_log and README have our part added. What is written to them is translated the other way
(`dynamic_events`, `trigger_files`).
"""

from __future__ import annotations

import os

import trio

from fakefs.files import Caller, Interrupt, OpenFile
from fakefs.guestfiles import GuestFile, GuestFiles
from fakefs.shadow import Shadows
from fakefs.static import TRACEFS, StaticPaths
from fakefs.wprobe.dynamic_events import DynamicEvents
from fakefs.wprobe.logs import Logs
from fakefs.wprobe.shown import Shown
from fakefs.wprobe.structs import GuestStructs, GuestSymbols
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Never, Role, TextFile, Writing, canonical, role_of
from fakefs.wprobe.trigger_files import TriggerFiles

_TEXT_MAX = 16 << 20
_ROOT = Caller(0, 0, 0)


class WprobeFiles(GuestFiles):
    """The guest's files, with wprobes."""

    def __init__(self, shadows: Shadows, nursery: trio.Nursery, is_static: StaticPaths, table: Table) -> None:
        super().__init__(shadows, nursery, is_static)
        guest = shadows.pump.guest
        structs = GuestStructs(guest)
        self._table = table
        self._events = DynamicEvents(self, table, GuestSymbols(guest, shadows.pump.agent.quiet_address), structs)
        self._triggers = TriggerFiles(self, table, structs)
        self.shown = Shown(table)
        self.logs = Logs(self)
        self._commands = trio.Lock()  # one at a time, as in the kernel: each is several requests to the guest

    # ---- what programs do

    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> GuestFile:
        """open(2); truncating a list of events leaves wprobes alone that it does not own, and refuses busy ones."""
        path = canonical(path)
        role = role_of(path)
        if role is None:
            return await super().open(caller, path, flags, mode)
        truncates = flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY
        if not truncates:
            return await self.open_text(caller, path, flags, role, mode)
        async with self._commands:
            if not await self._truncate(caller, role, path):
                return await self.open_text(caller, path, flags, role, mode)
            file = await self.open_text(caller, path, flags & ~os.O_TRUNC, role, mode)
            await super().truncate(caller, path, file, 0)  # which probes see; what the file does itself has been done
            return file

    async def _truncate(self, caller: Caller, role: Role, path: bytes) -> bool:
        """Do what opening with O_TRUNC means for wprobes; True when the guest is not to truncate any more."""
        if role is Role.ERROR_LOG:
            self.logs.clear(path)
        elif role is Role.TRIGGER:
            return await self._triggers.truncate(caller, path)
        elif role is Role.DYNAMIC_EVENTS and self._table.wprobes:
            await self._events.remove_all()
        elif role is Role.KPROBE_EVENTS and self._table.wprobes:
            await self._events.remove_kprobes(caller, path)
            return True
        return False

    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        """read(2) of the text as it was when its reading began, as the kernel's own lists are."""
        if not isinstance(file, TextFile) or not self._rewrites(file):
            return await super().read(caller, file, offset, size, flags, intr)
        if file.text is None or offset == 0:
            text = (await self._read_all(caller, file, flags, intr)).decode("latin-1")
            log = self.logs.of(file.path) if file.role is Role.ERROR_LOG else None
            profile = file.role is Role.KPROBE_PROFILE
            kprobes = await self.guest_text(TRACEFS + b"/kprobe_events") if profile else ""
            shown = log.render(text) if log else self.shown.rewrite(file.role, file.path, text, kprobes)
            file.text = shown.encode("latin-1")
        return file.text[offset : offset + size]

    async def _read_all(self, caller: Caller, file: GuestFile, flags: int, intr: Interrupt) -> bytes:
        parts, at = [], 0
        while at < _TEXT_MAX:
            data = await super().read(caller, file, at, 1 << 20, flags, intr)
            if not data:
                break
            parts.append(data)
            at += len(data)
        return b"".join(parts)

    def _rewrites(self, file: TextFile) -> bool:
        if file.role is Role.ERROR_LOG:
            return self.logs.of(file.path) is not None
        return file.role in (Role.README, Role.TRIGGER) or bool(self._table.wprobes)

    async def write(self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt) -> int:
        """write(2); commands about wprobes are ours, everything else goes to the guest as it is."""
        if isinstance(file, TextFile):
            writing = Writing(caller, file, flags, intr)
            if file.role is Role.ERROR_LOG:
                self.logs.clear(file.path)
            elif file.role is Role.DYNAMIC_EVENTS and self._events.concern(data):
                async with self._commands:
                    await self._events.write(writing, data)
                return len(data)
            elif file.role is Role.TRIGGER and b"_wprobe" in data:
                async with self._commands:
                    if await self._triggers.write(writing, data):
                        return len(data)
        return await super().write(caller, file, offset, data, flags, intr)

    async def rmdir(self, caller: Caller, path: bytes) -> None:
        """rmdir(2); an instance takes its triggers with it."""
        await super().rmdir(caller, path)
        async with self._commands:
            await self.drop_stale()

    # ---- what our parts do with the guest's own files

    async def open_text(self, caller: Caller, path: bytes, flags: int, role: Role, mode: int = 0) -> TextFile:
        """open(2) of a file that has to do with wprobes."""
        return TextFile(await super().open(caller, path, flags, mode), role)

    async def to_guest(self, writing: Writing, line: str) -> None:
        """Write a line of ours to the file that is being written to. Raises OSError."""
        data = line.encode("latin-1") + b"\n"
        await super().write(writing.caller, writing.file, writing.file.position, data, writing.flags, writing.intr)

    async def write_guest(self, path: bytes, data: bytes) -> None:
        """Write one of the guest's files, as its root. Raises OSError."""
        file = await super().open(_ROOT, path, os.O_WRONLY)
        try:
            await super().write(_ROOT, file, 0, data, os.O_WRONLY, Never())
        finally:
            await self.close(file)

    async def guest_text(self, path: bytes) -> str:
        """Return the text of one of the guest's files, as the guest has it; empty when it cannot be read."""
        try:
            file = await super().open(_ROOT, path, os.O_RDONLY)
        except OSError:
            return ""
        try:
            return (await self._read_all(_ROOT, file, os.O_RDONLY, Never())).decode("latin-1")
        finally:
            await self.close(file)

    async def exists(self, path: bytes) -> bool:
        """Is there a file of that guest path?"""
        try:
            await self.stat(path)
        except OSError:
            return False
        return True

    async def drop_stale(self) -> None:
        """Forget triggers that are gone with their event or instance."""
        await self._triggers.drop_stale()
