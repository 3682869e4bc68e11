"""One `w:` line of dynamic_events: parsed, shown again, and said as the carrier kprobe that stands for it in the guest.

    w[:[GRP/][EVENT]] [r|w|rw]@(ADDR|SYM[+-OFF]|-1)[:LEN] [NAME=]FETCHARG[:TYPE] ...

Checks come in the kernel's order: body, maxactive, spec, names, number of arguments, each argument. Whether the name is
taken is for the caller to find out; `taken` gives the error. Follows the wprobe series, v18.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, cast

from fakefs.wprobe import errors
from fakefs.wprobe.errors import WPROBE, LogEntry, ProbeError
from fakefs.wprobe.fetcharg import Piece, Pieces, Refused, translate
from fakefs.wprobe.kstrto import kstrtoint, kstrtoul, split_words
from fakefs.wprobe.typecast import NoStructs, Structs

TASK_SIZE = 0x7FFF_FFFF_F000  # x86-64 with four-level page tables: what lies below is the user's
DEFAULT_GROUP = "wprobes"
CARRIER_FUNCTION = "emergency_restart"  # never runs, and takes a kprobe on every kernel tried

Access = Literal["r", "w", "rw"]

_LENGTHS = (1, 2, 4, 8)
_MAX_ARGS = 128  # MAX_TRACE_ARGS
_MAX_NAME = 64  # MAX_EVENT_NAME_LEN, NUL included
_MAX_ARG = 63  # MAX_ARGSTR_LEN
_MAX_ARG_NAME = 32
_RESERVED = frozenset(
    (
        "common_type",
        "common_flags",
        "common_preempt_count",
        "common_pid",
        "common_tgid",
        "__probe_ip",
        "__probe_ret_ip",
        "__probe_func",
    )
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Symbols(Protocol):
    """What the guest's kernel has where."""

    dummy: int  # the address `-1` stands for; never accessed, and divisible by 8

    def lookup(self, name: str) -> int | None:
        """The kernel address of a symbol, data or text."""


@dataclass(frozen=True, slots=True)
class Arg:
    """A fetch argument. `text` is as typed, `:TYPE` included; `type` is that suffix alone, "" without one."""

    name: str
    text: str
    type: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """A wprobe as defined. `address` is what it watches until a trigger moves it."""

    group: str
    event: str
    access: Access
    symbol: str | None
    offset: int
    address: int
    dummy: bool
    length: int
    args: tuple[Arg, ...]
    line: str  # the command as error_log shows it: its words, one blank apart
    dummy_address: int

    def show(self, address: int | None = None) -> str:
        """Its line in dynamic_events. `address` is where the breakpoint is now, if a trigger has moved it."""
        current = self.address if address is None else address
        if self.symbol is not None:
            place = self.symbol + (f"{self.offset:+d}" if self.offset else "")
        else:
            place = "-1" if current == self.dummy_address else f"0x{current:x}"
        words = [f"w:{self.group}/{self.event}", f"{self.access}@{place}:{self.length}"]
        return " ".join(words + [f"{arg.name}={arg.text}" for arg in self.args])

    def taken(self, *, by_wprobe: bool) -> ProbeError:
        """The error for a definition whose group and name are in use, by another wprobe or by any other event."""
        if by_wprobe:
            return ProbeError(errno.EBUSY, LogEntry(WPROBE, errors.NO_SIBLING, self.line, 0))
        return ProbeError(errno.EEXIST, LogEntry(WPROBE, errors.EVENT_EXIST, self.line, 0))

    def carrier(self, function: str = CARRIER_FUNCTION) -> str:
        """The kprobe_events line of the event that stands for it in the guest."""
        return str(self._pieces(function))

    def map_caret(self, column: int, function: str = CARRIER_FUNCTION) -> int:
        """The column of the user's line that one of the carrier's line means."""
        return self._pieces(function).to_user(column)

    def carrier_caret(self, column: int, function: str = CARRIER_FUNCTION) -> int:
        """The column of the carrier's line for one of the user's."""
        return self._pieces(function).to_carrier(column)

    def map_entry(self, entry: LogEntry, function: str = CARRIER_FUNCTION) -> LogEntry:
        """What the guest's parser said of the carrier, as said of the wprobe."""
        return LogEntry(WPROBE, entry.text, self.line, self.map_caret(entry.caret, function))

    def _pieces(self, function: str) -> Pieces:
        name, spec = self.line.split(" ", 2)[:2]
        head = Piece(0, len(name), f"p:{self.group}/{self.event}", False)
        gap = Piece(len(name), 1, " ", True)
        place = Piece(len(name) + 1, len(spec), function, False)
        return Pieces((head, gap, place, *(piece for arg in self.args for piece in arg.pieces)))


def parse(line: str, symbols: Symbols, structs: Structs | None = None) -> Definition:
    """Parse a line whose first word starts with `w`. Raises `ProbeError`."""
    return _Parser(split_words(line), symbols, structs or NoStructs()).parse()


class _Parser:
    def __init__(self, words: list[str], symbols: Symbols, structs: Structs) -> None:
        self._words = words
        self._line = " ".join(words)
        self._symbols = symbols
        self._structs = structs

    def _refuse(self, text: str, column: int, number: int = errno.EINVAL) -> NoReturn:
        raise ProbeError(number, LogEntry(WPROBE, text, self._line, column))

    def parse(self) -> Definition:
        if len(self._words) < 2:
            self._refuse(errors.NO_ARG_BODY, 0)
        head, spec, *args = self._words
        if head[1:2] not in ("", ":"):
            self._refuse(errors.NO_MAXACT, 1)
        access, symbol, offset, address, dummy, length = self._spec(spec, len(head) + 1)
        group, event = self._names(head[2:]) if len(head) > 1 else (DEFAULT_GROUP, "")
        if not event:
            event = re.sub(r"[^A-Za-z0-9_]", "_", symbol if symbol is not None else f"w_0x{address:x}")
            event = event[: _MAX_NAME - 1]
        if len(args) > _MAX_ARGS:
            self._refuse(errors.TOO_MANY_ARGS, len(head) + len(spec) + 2, errno.E2BIG)
        parsed = self._args(args, len(head) + len(spec) + 2)
        return Definition(
            group=group,
            event=event,
            access=access,
            symbol=symbol,
            offset=offset,
            address=address,
            dummy=dummy,
            length=length,
            args=parsed,
            line=self._line,
            dummy_address=self._symbols.dummy,
        )

    def _spec(self, spec: str, start: int) -> tuple[Access, str | None, int, int, bool, int]:
        access, at, _ = spec.partition("@")
        if not at:
            self._refuse(errors.BAD_ACCESS_FMT, start)
        if access not in ("", "r", "w", "rw"):
            self._refuse(errors.BAD_ACCESS_TYPE, start)
        before, colon, size = spec.partition(":")
        length = kstrtoint(size) if colon else 4
        if length not in _LENGTHS:
            self._refuse(errors.BAD_ACCESS_LEN, start + len(before) + 1)

        place = before[len(access) + 1 :]
        column = start + len(access) + 1
        symbol, offset = None, 0
        dummy = place == "-1"
        address = self._symbols.dummy if dummy else kstrtoul(place)
        if address is None:
            symbol, offset = self._offset(place, column)
            base = self._symbols.lookup(symbol) if symbol else None
            if base is None:
                self._refuse(errors.BAD_ACCESS_ADDR, column, errno.ENOENT)
            address = (base + offset) % (1 << 64)
        if address < TASK_SIZE or address % length:
            self._refuse(errors.BAD_ACCESS_ADDR, column)
        return cast(Access, access or "rw"), symbol, offset, address, dummy, length

    def _offset(self, place: str, column: int) -> tuple[str, int]:
        found = re.search(r"[+-]", place)
        if not found:
            return place, 0
        offset = kstrtoint(place[found.start() :])
        if offset is None:
            self._refuse(errors.BAD_PROBE_ADDR, column + found.start())
        return place[: found.start()], offset

    def _names(self, name: str) -> tuple[str, str]:
        """Group and event; the event is empty where it is to be made up."""
        group, separator, event = name.partition("/" if "/" in name else ".")
        column = 2
        if not separator:
            group, event = DEFAULT_GROUP, name
        else:
            if not group:
                self._refuse(errors.NO_GROUP_NAME, column)
            if len(group) >= _MAX_NAME:
                self._refuse(errors.GROUP_TOO_LONG, column)
            if not _GROUP.fullmatch(group):
                self._refuse(errors.BAD_GROUP_NAME, column)
            column += len(group) + 1
            if not event:
                return group, ""
        if not event:
            self._refuse(errors.NO_EVENT_NAME, column)
        if len(event) >= _MAX_NAME:
            self._refuse(errors.EVENT_TOO_LONG, column)
        if not _NAME.fullmatch(event):
            self._refuse(errors.BAD_EVENT_NAME, column)
        return group, event

    def _args(self, words: list[str], start: int) -> tuple[Arg, ...]:
        args: list[Arg] = []
        used = set(_RESERVED)
        for number, word in enumerate(words, start=1):
            name, equals, text = word.partition("=")
            if not equals:
                name, text = f"arg{number}", word
            elif not name:
                self._refuse(errors.NO_ARG_NAME, start)
            elif len(name) > _MAX_ARG_NAME:
                self._refuse(errors.ARG_NAME_TOO_LONG, start)
            if not _NAME.fullmatch(name):
                self._refuse(errors.BAD_ARG_NAME, start)
            if name in used:
                self._refuse(errors.USED_ARG_NAME, start)
            used.add(name)
            args.append(self._arg(name, text, start, start + len(word) - len(text)))
            start += len(word) + 1
        return tuple(args)

    def _arg(self, name: str, text: str, start: int, column: int) -> Arg:
        if len(text) > _MAX_ARG:
            self._refuse(errors.ARG_TOO_LONG, column, errno.ENOSPC)
        if not text:
            self._refuse(errors.NO_ARG_BODY, column)
        try:
            body = translate(text, column, self._structs)
        except Refused as refused:
            self._refuse(refused.text, refused.column, refused.number)
        named = Piece(start, column - start, f"{name}=", column > start)
        _, colon, suffix = text.partition(":")
        return Arg(name, text, colon + suffix, (Piece(start - 1, 1, " ", True), named, *body))
