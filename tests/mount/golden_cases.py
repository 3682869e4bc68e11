"""Transcripts of a real tracefs: their file format, and how an answer is held against one.

A file is a sequence of cases:

    === GROUP/NNN-name
    --- cmd
    what bash was given, in the tracefs
    --- out
    what it printed, stdout and stderr together
    --- exit: 0

In `out` the fields that differ from run to run are `<PID>`, `<TS>` and so on (`_FIELDS`); a line with such a field may
have any amount of blank where the transcript has some. `--- nonl: 1` says that the output did not end in a newline.
The files were taken on one kernel (`RELEASE`) with two CPUs; what is left out of them and why is in `test_golden`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

RELEASE = "7.2.13"
"""The kernel that was asked."""

DIRECTORY = Path(__file__).parent / "golden"

_FIELDS = {
    "<...>": r"\S.*?",
    "<PID>": r"\d+",
    "<TGID>": r"[\d-]+",
    "<CPU>": r"\d+",
    "<TS>": r"\d+(?:\.\d+)?",
    "<HEX>": r"(?:0x)?[0-9a-f]+",
    "<ADDR>": r"(?:0x)?[0-9a-f]+",
    "<ID>": r"\d+",
    "<DUR>": r"[\d.]+",
    "<N>": r"\d+",
}
_FIELD = re.compile("|".join(map(re.escape, _FIELDS)))
_CPUS = re.compile(r"#P:\d+")
_ERRNO_TEXTS = {os.strerror(number): name for number, name in errno.errorcode.items() if name != "EDEADLOCK"}
_ERRNO_TEXT = re.compile("|".join(sorted(map(re.escape, _ERRNO_TEXTS), key=len, reverse=True)))
_STATUS = re.compile(r"^(?:.*\b)?rc=\d+", re.MULTILINE)
_CASE = re.compile(
    r"--- cmd\n(?P<cmd>.*?)\n--- out\n(?P<out>.*?)(?:--- nonl: (?P<nonl>[01])\n)?--- exit: (?P<exit>\d+)\n*", re.DOTALL
)


class NotATranscript(ValueError):
    """The text is not in the format; the message says where."""


@dataclass(frozen=True)
class Case:
    """One script and what it printed (`out`, with fields) on the real kernel."""

    name: str
    cmd: str
    out: str
    exit: int

    @cached_property
    def errnos(self) -> list[str]:
        """The errors that programs told of, in order."""
        return errnos(self.out)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What an equal answer matches from its first to its last character."""
        return re.compile("\n".join(map(_line_pattern, self.out.split("\n"))))


def errnos(text: str) -> list[str]:
    """The names of the errors whose messages are in `text`, in order."""
    return [_ERRNO_TEXTS[found] for found in _ERRNO_TEXT.findall(text)]


def statuses(text: str) -> list[str]:
    """The `rc=N` that scripts print of their commands."""
    return [found.rpartition("rc=")[2] for found in _STATUS.findall(text)]


def _line_pattern(line: str) -> str:
    line = _CPUS.sub("#P:<N>", line)
    fields = _FIELD.findall(line)
    if not fields:
        return re.escape(line)
    loose = fields != ["<N>"] or "#P:" not in line
    parts, at = [], 0
    for found in _FIELD.finditer(line):
        parts += [_literal(line[at : found.start()], loose), _FIELDS[found[0]]]
        at = found.end()
    whole = "".join(parts) + _literal(line[at:], loose)
    return r"[ \t]*" + whole if loose else whole


def _literal(text: str, loose: bool) -> str:
    if not loose:
        return re.escape(text)
    # `[<TS>]` was `[  12.345]`: blank may have been taken away behind an opening bracket too.
    pieces = [re.escape(piece) for piece in re.split(r"[ \t]+", text)]
    joined = r"[ \t]+".join(pieces)
    return re.sub(r"\\\[$", r"\\[[ \\t]*", joined)


def same(case: Case, out: str, status: int) -> str | None:
    """None when an answer is the transcript's; otherwise what is different, to read."""
    if status != case.exit:
        return f"exit {status}, not {case.exit}"
    if case.pattern.fullmatch(out):
        return None
    theirs, ours = case.out.split("\n"), out.split("\n")
    for number, (expected, got) in enumerate(zip(theirs, ours, strict=False), 1):
        if not re.fullmatch(_line_pattern(expected), got):
            return f"line {number}: {got!r}, not {expected!r}"
    return f"{len(ours)} lines, not {len(theirs)}"


def alike(case: Case, out: str, status: int) -> str | None:
    """None when an answer has the transcript's shape: exit status, errors and `rc=` lines in the same order."""
    if status != case.exit:
        return f"exit {status}, not {case.exit}"
    if errnos(out) != case.errnos:
        return f"errors {errnos(out)}, not {case.errnos}"
    if statuses(out) != statuses(case.out):
        return f"statuses {statuses(out)}, not {statuses(case.out)}"
    return None


def parse(text: str) -> Iterator[Case]:
    """Yield the cases of a file's text. Raises NotATranscript."""
    head, *parts = re.split(r"^=== ", text, flags=re.MULTILINE)
    if head.strip():
        raise NotATranscript(f"text before the first case: {head[:40]!r}")
    for part in parts:
        name, _, body = part.partition("\n")
        match = _CASE.fullmatch(body)
        if not re.fullmatch(r"[a-z0-9-]+/[\w.+-]+", name) or match is None:
            raise NotATranscript(f"case {name[:60]!r} is malformed")
        out = match["out"]
        if match["nonl"] == "1":
            out = out.removesuffix("\n")
        yield Case(name, match["cmd"], out, int(match["exit"]))


def write(case: Case) -> str:
    """Return a case as text for `parse()`."""
    nonl = bool(case.out) and not case.out.endswith("\n")
    out = case.out + "\n" if nonl else case.out
    mark = "--- nonl: 1\n" if nonl else ""
    return f"=== {case.name}\n--- cmd\n{case.cmd}\n--- out\n{out}{mark}--- exit: {case.exit}\n\n"


def load(directory: Path = DIRECTORY) -> list[Case]:
    """The committed cases, in the order of files and lines."""
    files = sorted(directory.glob("*.txt"))
    return [case for path in files for case in parse(path.read_text(encoding="latin-1"))]
