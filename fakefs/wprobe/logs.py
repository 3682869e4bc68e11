"""The error_log of each tracing instance, with our entries in it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from fakefs.wprobe.errorlog import ErrorLog, parse
from fakefs.wprobe.errors import LogEntry, ProbeError
from fakefs.wprobe.textfile import Never, Role, Writing, directory_of, instance_of

if TYPE_CHECKING:
    from fakefs.wprobe.files import WprobeFiles


class Logs:
    """Our entries, by instance."""

    def __init__(self, files: WprobeFiles) -> None:
        self._files = files
        self._logs: dict[bytes, ErrorLog] = {}
        self._errors = 0

    def of(self, path: bytes) -> ErrorLog | None:
        """Return our share of an instance's error_log, if there is one."""
        return self._logs.get(instance_of(path))

    def clear(self, path: bytes) -> None:
        """An error_log is written to, or truncated."""
        self._logs.pop(instance_of(path), None)

    async def refuse(self, writing: Writing, error: ProbeError) -> OSError:
        """Put an error's entry into the log; return what the writer gets.

        Its time and its place among the guest's own entries are the guest's to say: a command that the guest is sure
        to refuse is written, and the entry it logs for that is shown as ours.
        """
        if error.entry is not None:
            self._errors += 1
            marker = f"wprobe_error_{self._errors}"
            is_trigger = writing.file.role is Role.TRIGGER
            bad = f"hist:keys={marker}" if is_trigger else f"p:{marker} vfs_read ${marker}"
            with suppress(OSError):
                await self._files.to_guest(Writing(writing.caller, writing.file, os.O_APPEND, Never()), bad)
            await self.adopt(writing.file.path, marker, error.entry)
        return OSError(error.number, os.strerror(error.number))

    async def adopt(self, path: bytes, marker: str, entry: LogEntry) -> None:
        """Show the guest's last entry, if it is about a command with `marker` in it, as `entry`."""
        key = instance_of(path)
        entries = parse(await self._files.guest_text(directory_of(key) + b"/error_log"))
        if entries and marker in entries[-1].entry.command:
            self._logs.setdefault(key, ErrorLog()).adopt(entries[-1], entry)
