"""Sessions with a kernel that has the wprobe series itself, and how an answer of ours is held against one.

A file is a sequence of sessions:

    === NNN-name
    $ a command, given to bash in the tracefs; `guest` before it: to a shell inside the guest
    what it printed, stdout and stderr together
    [exit 1]

An exit status of 0 is left out. What differs from run to run and from kernel to kernel is replaced in the file as
`normal()` replaces it in an answer. The kernel asked was 7.3-rc7 with version 18 of the series.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "wprobe_golden" / "sessions.txt"

SLEEP = "sleep() { for i in {1..20}; do command sleep 0.01; cat tracing_on > /dev/null; done; }"
"""An idle guest has no ticks, and its jiffies stand still: however long a sleep is asked for, 20 ticks."""

FILE_THERE = {"219-act-event-disabled": "/tmp/y1", "221-act-btf-inode": "/tmp/y1"}
"""Files of the guest's that a session before had made."""

_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"^\S+: line \d+: ", ""),
        (r"^\[ *\d+\.\d+\]", "[TS]"),
        (r"^\s*\S+-\d+\s+\[\d+\] \S+\s+\d+\.\d+: ", "TASK: "),
        (r"^\d+ \d+ \d+ type: \d+", "RAW"),  # the trace option raw
        (r"\bID: \d+", "ID: N"),
        (r" # missed: \d+", ""),
        (r"w_0xffff[0-9a-f]{12}", "w_ADDR"),
        (r"\b(0x)?ffff[0-9a-f]{12}\b", "ADDR"),
        (r"0x(ff[0-9a-f]{6}|1000[0-9a-f]{5}) ?(\(\d+\))?", "VAL"),  # jiffies
        (r"[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+", "FUNC"),
        (r"\(-\d{8,}\)", "(IP)"),
    )
]


@dataclass(frozen=True)
class Session:
    """Commands, and with them what they printed."""

    name: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands alone."""
        return [line[2:] for line in self.text.split("\n") if line.startswith("$ ")]

    def script(self, guest: str) -> str:
        """A bash script that prints the same on the same kernel; `guest` is the command before one for the guest."""
        lines = [f'guest() {{ {guest} "$1"; }}', SLEEP]
        for command in self.commands:
            lines += [f"echo {shlex.quote('$ ' + command)}", f"eval {shlex.quote(command)}"]
            lines.append('status=$?; if [ $status != 0 ]; then echo "[exit $status]"; fi')
        return "\n".join(lines)


def normal(text: str) -> str:
    """A text without what differs from run to run and from kernel to kernel."""
    lines = text.strip("\n").split("\n")
    for pattern, by in _REPLACED:
        lines = [pattern.sub(by, line) for line in lines]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def parse(text: str) -> Iterator[Session]:
    """Yield the sessions of a file's text."""
    for part in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        yield Session(name, "\n".join(line.rstrip() for line in rest.split("\n") if line.strip()))


def load() -> list[Session]:
    """The committed sessions."""
    return list(parse(FILE.read_text()))
