"""What a write to dynamic_events is made of: lines, comments, and commands that remove events.

A write is cut into lines as the kernel cuts it: at most 4095 bytes are looked at in one go, a line has to end within
them, and everything from `#` on is a comment. The first line that fails ends the write with its error: the lines before
it stay in force, those after it are not looked at. (bash's printf sends each line in a write of its own, which can look
like one write that goes on after a bad line.)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from fakefs.wprobe.definition import Definition
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.kstrto import split_words

_BUFFER = 4096  # bytes, the kernel's WRITE_BUFSIZE, of which one is for the NUL


def lines(written: bytes) -> Iterator[str]:
    """The commands of one write(2), comments cut off, blank ones too: one of those is a command that does nothing.

    Raises `ProbeError` (EINVAL, nothing in error_log) on reaching a line that is too long.
    """
    done = 0
    while done < len(written):
        chunk = written[done : done + _BUFFER - 1]
        end = chunk.rfind(b"\n") + 1
        if done + len(chunk) == len(written):
            end = len(chunk)
        elif not end:
            raise ProbeError(errno.EINVAL)
        whole = chunk[:end]
        for line in whole.removesuffix(b"\n").split(b"\n"):
            yield line.partition(b"\0")[0].partition(b"#")[0].decode("latin-1")
        done += end


def is_wprobe(line: str) -> bool:
    """Whether a line of dynamic_events defines a wprobe (as opposed to any other kind, or a removal)."""
    words = split_words(line)
    return bool(words) and words[0][0] == "w" and line[0] not in "-!"


@dataclass(frozen=True, slots=True)
class Removal:
    """`-:[GRP/]EVENT [ARGS]`. No group stands for any, an empty event for all of the group."""

    group: str | None
    event: str
    args: tuple[str, ...]

    def matches(self, definition: Definition) -> bool:
        """Whether it removes that wprobe: ARGS have to be its leading fetch arguments, as dynamic_events shows them."""
        if self.event not in ("", definition.event) or self.group not in (None, definition.group):
            return False
        shown = [f"{arg.name}={arg.text}" for arg in definition.args]
        return list(self.args) == shown[: len(self.args)]


def parse_removal(line: str) -> Removal | None:
    """The removal a line stands for, or None if it is none: one has `-` or `!` in its very first column.

    Raises `ProbeError` (EINVAL, nothing in error_log).
    """
    if line[:1] not in ("-", "!"):
        return None
    word, *args = split_words(line)
    if word[0] == "-" and word[1:2] != ":":
        raise ProbeError(errno.EINVAL)
    group, slash, event = word.partition(":")[2].partition("/")
    if not slash:
        group, event = "", group
        if not event:
            raise ProbeError(errno.EINVAL)
    return Removal(group if slash else None, event, tuple(args))
