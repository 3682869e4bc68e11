"""What a reader sees of the guest's texts: `w:` and `set_wprobe` for what stands for them in the guest, or nothing."""

from __future__ import annotations

import re

from fakefs.wprobe.carrier import FUNCTION
from fakefs.wprobe.table import Table
from fakefs.wprobe.textfile import Role
from fakefs.wprobe.wprobe import Wprobe

# Lines the README of a kernel with wprobes has, each group in front of a line that every kernel's has.
_README = (
    (
        "\t  accepts: event-definitions",
        "  wprobe_events\t\t- Create/append/remove/show the hardware breakpoint dynamic events\n"
        "\t\t\t  Write into this file to define/undefine new trace events.\n",
    ),
    (
        "\t           s:[synthetic/]",
        "\t           w[:[<group>/][<event>]] [r|w|rw]@<addr>[:<len>] [<args>]\n",
    ),
    (
        "\t            enable_hist:<system>:<event>\n",
        "\t            set_wprobe:<wprobe-event>:<field>[+|-<offset>]\n"
        "\t            clear_wprobe:<wprobe-event>[:<field>[+|-<offset>]]\n",
    ),
)
_MORE_README = (
    (
        "\t           s:[synthetic/]",
        "\t           w<slots>:[<group>/]<event> [r|w|w!|rw]@<addr>[:<len>] [<args>]\n",
    ),
    (
        "\t            clear_wprobe:",
        "\t            set_wprobe:<wprobe-event>:<field>[:<count>][:timeout=<time>]\n",
    ),
)


class Shown:
    """Rewrites the guest's texts."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def rewrite(self, role: Role, path: bytes, text: str, kprobes: str) -> str:
        """Return a file's text as a reader sees it. `kprobes` is the guest's kprobe_events, for a kprobe_profile."""
        lines = text.splitlines(keepends=True)
        match role:
            case Role.DYNAMIC_EVENTS | Role.KPROBE_EVENTS:
                lines = [self.event_line(line, role is Role.DYNAMIC_EVENTS) for line in lines]
            case Role.KPROBE_PROFILE:  # in the order of kprobe_events, with nothing but the event's name
                owners = kprobes.splitlines()
                lines = [line for line, owner in zip(lines, owners, strict=False) if not self._wprobe_of(owner)]
            case Role.KPROBE_LIST:
                carriers = len(self._table.wprobes)
                at = [number for number, line in enumerate(lines) if f" {FUNCTION}+0x" in line][:carriers]
                lines = [line for number, line in enumerate(lines) if number not in at]
            case Role.FUNCTIONS:
                lines = [line for line in lines if not line.startswith(f"{FUNCTION} ")]
            case Role.README:
                return self._readme(text)
            case Role.TRIGGER:
                lines = [self._trigger_line(path, line) for line in lines]
        return "".join(lines)

    def _wprobe_of(self, line: str) -> Wprobe | None:
        """Return the wprobe whose carrier a line of the guest's kprobe_events is."""
        found = re.match(rf"p:([^/ ]+)/([^ ]+) {FUNCTION}\b", line)
        return self._table.find(found[1], found[2]) if found else None

    def event_line(self, line: str, shown: bool) -> str:
        """Return what a line of dynamic_events or kprobe_events is to a reader, who sees wprobes or not."""
        wprobe = self._wprobe_of(line)
        if wprobe is None:
            return line
        return self._show(wprobe) + "\n" if shown else ""

    def _show(self, wprobe: Wprobe) -> str:
        address = wprobe.address
        missing = address is not None and not self._table.strict and not self._table.is_mapped(address)
        return wprobe.show() + (" # not mapped" if missing else "")

    def _trigger_line(self, path: bytes, line: str) -> str:
        if line.startswith("# traceon "):
            return f"{line.rstrip()} set_wprobe clear_wprobe\n"
        for attached in self._table.attached:
            if attached.path == path and line.startswith(attached.command + ":"):
                count, target = re.match(r"[^ ]*:count=(\d+)", line), attached.target
                left = int(count[1]) if count else None
                return attached.trigger.show(target.missed, left, target.show_slots()) + "\n"
        return line

    def _readme(self, text: str) -> str:
        for anchor, lines in _README if self._table.strict else _README + _MORE_README:
            at = text.find(anchor)
            if at >= 0:
                text = text[:at] + lines + text[at:]
        return text
