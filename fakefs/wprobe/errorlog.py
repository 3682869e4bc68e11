"""error_log: the guest's own entries and ours, merged into one file as the kernel prints it.

The kernel keeps the last eight entries of a tracing instance. So does this, of the guest's and ours together. An entry
the guest logged about a carrier kprobe is shown as one about the wprobe that the user wrote: see `ErrorLog.adopt`.
"""

from __future__ import annotations

import re
from collections import deque
from typing import NamedTuple

from fakefs.wprobe.errors import LogEntry

KEPT = 8  # TRACING_LOG_ERRS_MAX
_PREFIX = "  Command: "
_ENTRY = re.compile(
    r"^\[ *(?P<seconds>[0-9]{1,15})\.(?P<micros>[0-9]{6})\] (?P<subsystem>.*?): error: (?P<text>.*)\n"
    r"  Command: (?P<command>(?:.*\n)+?) {11}(?P<blanks> *)\^$",
    re.MULTILINE,
)


class Logged(NamedTuple):
    """An entry and when it was made: microseconds of the guest's trace clock since its boot."""

    micros: int
    entry: LogEntry

    @property
    def timestamp(self) -> float:
        """Seconds of the guest's trace clock, as printed."""
        return self.micros / 1e6


def render_entry(logged: Logged) -> str:
    """The three lines of one entry, each with its newline."""
    seconds, micros = divmod(logged.micros, 1_000_000)
    entry = logged.entry
    return (
        f"[{seconds:5d}.{micros:06d}] {entry.subsystem}: error: {entry.text}\n"
        f"{_PREFIX}{entry.command}\n"
        f"{' ' * (len(_PREFIX) + entry.caret)}^\n"
    )


def parse(text: str) -> list[Logged]:
    """The entries of an error_log as the guest printed it, oldest first. What does not look like one is left out."""
    return [
        Logged(
            int(found["seconds"]) * 1_000_000 + int(found["micros"]),
            LogEntry(found["subsystem"], found["text"], found["command"][:-1], len(found["blanks"])),
        )
        for found in _ENTRY.finditer(text)
    ]


class ErrorLog:
    """Our share of one tracing instance's error_log."""

    def __init__(self) -> None:
        self._ours: deque[Logged] = deque(maxlen=KEPT)
        self._adopted: dict[Logged, LogEntry] = {}

    def add(self, entry: LogEntry, micros: int) -> None:
        """Log an entry of ours at that time of the guest's trace clock."""
        self._ours.append(Logged(micros, entry))

    def adopt(self, theirs: Logged, entry: LogEntry) -> None:
        """Show the guest's entry `theirs`, about a command the user never wrote, as `entry` from now on."""
        self._adopted[theirs] = entry
        while len(self._adopted) > KEPT:  # the guest has forgotten the oldest by now
            del self._adopted[next(iter(self._adopted))]

    def clear(self) -> None:
        """What truncating the file does. The guest's own has to be truncated as well."""
        self._ours.clear()
        self._adopted.clear()

    def render(self, guest: str) -> str:
        """The whole file, `guest` being what the guest's own error_log reads."""
        theirs = [Logged(each.micros, self._adopted.get(each, each.entry)) for each in parse(guest)]
        merged = sorted([*theirs, *self._ours], key=lambda each: each.micros)
        return "".join(map(render_entry, merged[-KEPT:]))
