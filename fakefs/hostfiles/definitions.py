"""Which files the uprobe definitions in a write to uprobe_events or dynamic_events name.

Only the path is looked for, as create_trace_uprobe() does: the second word, if it has a slash in it, up to its last
colon, if a digit follows that. Everything else about a definition is the guest's to judge. Follows
Documentation/trace/uprobetracer.rst.
"""

from __future__ import annotations

from fakefs.wprobe.commands import lines
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.kstrto import split_words

_FILES = (b"/uprobe_events", b"/dynamic_events")


def takes_uprobes(path: bytes) -> bool:
    """Can uprobes be defined by writing to this file of the guest?"""
    return path.endswith(_FILES)


def named_files(written: bytes) -> list[bytes]:
    """Return the paths that the definitions in one write(2) name, as they are written, each once."""
    found: dict[bytes, None] = {}
    try:
        for line in lines(written):
            path = _named_file(line)
            if path is not None:
                found[path] = None
    except ProbeError:
        pass  # a line that is too long: the guest looks at no more than what came before
    return list(found)


def _named_file(line: str) -> bytes | None:
    words = split_words(line)
    if len(words) < 2 or words[0][0] not in "pr":
        return None
    path, colon, offset = words[1].rpartition(":")
    if not colon or "/" not in words[1] or offset[:1] not in tuple("0123456789"):
        return None
    return path.encode("latin-1") or None
