"""What is written to the `trigger` file of an event where wprobes are concerned."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from fakefs.files import Caller
from fakefs.static import TRACEFS
from fakefs.wprobe import definition, trigger
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.structs import GuestStructs
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Never, Role, Writing, directory_of, instance_of
from fakefs.wprobe.wprobe import Attached

if TYPE_CHECKING:
    from fakefs.wprobe.files import WprobeFiles

# The kernel reads a record's fields for a trigger only when it has a filter, so one without gets this, always true.
_ALWAYS = "common_pid >= 0"
_FIELD = re.compile(r"\tfield:[^;]*?(\w+)(?:\[[^\]]*\])?;\toffset:(\d+);\tsize:(\d+);")
_ID = re.compile(r"^ID: (\d+)$", re.MULTILINE)


class TriggerFiles:
    """Attaches and detaches set and clear triggers; others go to the guest."""

    def __init__(self, files: WprobeFiles, table: Table, structs: GuestStructs) -> None:
        self._files = files
        self._table = table
        self._structs = structs

    async def write(self, writing: Writing, data: bytes) -> bool:
        """Do what is written; False when it is about no wprobe. Raises OSError."""
        await self.drop_stale()
        path = writing.file.path
        directory = path.rsplit(b"/", 1)[0]
        form = await self._files.guest_text(directory + b"/format")
        fields = {name: (int(at), int(size)) for name, at, size in _FIELD.findall(form)}
        number = _ID.search(form)
        try:
            wanted = trigger.parse(
                data.decode("latin-1").rstrip("\n"),
                fields,
                lambda name: self._table.find(definition.DEFAULT_GROUP, name),
                structs=self._structs,
                on_kprobe=self._table.strict and await self._is_kprobe(directory),
                extended=not self._table.strict,
            )
        except ProbeError as error:
            raise await self._files.logs.refuse(writing, error) from None
        if wanted is None or number is None:
            return False
        target = self._table.find(definition.DEFAULT_GROUP, wanted.target)
        assert target is not None
        place = fields.get(wanted.field, (0, 0))[0] if wanted.field is not None else None
        attached = Attached(path, wanted, target, int(number[1]), place)
        if wanted.remove:
            await self._detach(writing, attached)
        else:
            await self._attach(writing, attached)
        return True

    async def _attach(self, writing: Writing, attached: Attached) -> None:
        wanted, target = attached.trigger, attached.target
        others = [each for each in self._table.attached if each.path == attached.path and each.target is target]
        if any(each.trigger.kind == wanted.kind for each in others):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        attached.second = any(not each.second for each in others)
        before = list(target.slots)
        if wanted.kind == "set" and not target.setters:
            self._table.park(target)
        count = "" if wanted.count is None else f":{wanted.count}"
        self._table.attach(attached)
        try:
            await self._files.to_guest(writing, f"{attached.command}{count} if {wanted.filter or _ALWAYS}")
        except OSError:
            self._table.detach(attached)
            target.slots = before
            raise

    async def _detach(self, writing: Writing, wanted: Attached) -> None:
        """Remove a trigger: matched by its wprobe and kind alone. Removing one that is not there succeeds."""
        for attached in self._table.attached:
            same = attached.path == wanted.path and attached.target is wanted.target
            if same and attached.trigger.kind == wanted.trigger.kind:
                if attached.trigger.kind == "set" and attached.target.slots and attached.target.setters == 1:
                    await self._mute(attached)
                await self._files.to_guest(writing, f"!{attached.command}")
                self._table.detach(attached)
                return

    async def _mute(self, attached: Attached) -> None:
        """Soft-disable a wprobe that a trigger has armed, or it would stay enabled without that trigger."""
        name = attached.target.definition
        path = directory_of(instance_of(attached.path)) + f"/events/{name.group}/{name.event}/enable".encode()
        await self._files.write_guest(path, b"0")

    async def drop_stale(self) -> None:
        """Forget triggers whose event or instance is gone: they went with it."""
        for attached in list(self._table.attached):
            if not await self._files.exists(attached.path):
                self._table.detach(attached)

    async def truncate(self, caller: Caller, path: bytes) -> bool:
        """Do what opening with O_TRUNC does to histograms; False when the guest can do that itself.

        It would remove the enable_hist triggers too, and with them one that stands for a wprobe's.
        """
        ours = [each.command for each in self._table.attached if each.second and each.path == path]
        if not ours:
            return False
        lines = (await self._files.guest_text(path)).splitlines()
        file = await self._files.open_text(caller, path, os.O_RDWR | os.O_APPEND, Role.TRIGGER)
        try:
            for line in lines:
                theirs = re.match(r"(hist|enable_hist|disable_hist):", line) and not line.startswith(tuple(ours))
                if theirs:
                    command = re.sub(r" \[(active|paused|pause)\]$", "", line)
                    with suppress(OSError):  # one whose variables another uses stays
                        await self._files.to_guest(Writing(caller, file, os.O_APPEND, Never()), f"!{command}")
        finally:
            await self._files.close(file)
        return True

    async def _is_kprobe(self, directory: bytes) -> bool:
        group, event = (part.decode("latin-1") for part in directory.rsplit(b"/", 2)[1:])
        if self._table.find(group, event):
            return False
        listed = await self._files.guest_text(TRACEFS + b"/kprobe_events")
        return re.search(rf"^[pr]\d*:{re.escape(f'{group}/{event}')} ", listed, re.MULTILINE) is not None
