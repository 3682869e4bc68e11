"""One `w:` line of dynamic_events: parsed, shown again, and said as the carrier kprobe that stands for it in the guest.

    w[:[GRP/][EVENT]] [r|w|rw]@(ADDR|SYM[+-OFF]|-1)[:LEN] [NAME=]FETCHARG[:TYPE] ...

Checks come in the kernel's order: body, maxactive, spec, names, number of arguments, each argument. Whether the name is
taken is for the caller to find out; `taken` gives the error. Follows the wprobe series, v18. With `extended` more is
accepted, none of which means something else to the series:

    w[SLOTS]:[GRP/][EVENT] [r|w|w!|rw]@...[:LEN]     LEN 1 to 4096 at any address, and arguments of `fetcharg`

SLOTS (1 to 64) is how many objects set_wprobe triggers can have watched at a time, `w!` only what changes the memory.
`rw@0:8` is `rw@-1:8`, as it was in the series' earlier versions.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, Protocol, cast

from fakefs.wprobe import errors
from fakefs.wprobe.errors import WPROBE, LogEntry, ProbeError
from fakefs.wprobe.fetcharg import Guest, Piece, Pieces, Refused, translate
from fakefs.wprobe.kstrto import kstrtoint, kstrtoul, split_words
from fakefs.wprobe.typecast import NoStructs, Structs

TASK_SIZE = 0x7FFF_FFFF_F000  # x86-64 with four-level page tables: what lies below is the user's
DEFAULT_GROUP = "wprobes"
CARRIER_FUNCTION = "emergency_restart"  # never runs, and takes a kprobe on every kernel tried

Access = Literal["r", "w", "rw"]

_LENGTHS = (1, 2, 4, 8)
MAX_LENGTH = 4096  # of an extended one
_EARLIER_DUMMY = "rw@0:8"  # for rw@-1:8 in the documentation and tests of the series before its v14; v18 refuses it
MAX_SLOTS = 64
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
    unresolved: bool = False  # it names a symbol the guest does not have


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
    slots: int = 0  # 0: one object, watched until it is cleared, as in the series
    changes: bool = False  # only writes that change something

    def show(self, address: int | None = None) -> str:
        """Its line in dynamic_events. `address` is where the breakpoint is now, if a trigger has moved it."""
        current = self.address if address is None else address
        if self.symbol is not None:
            place = self.symbol + (f"{self.offset:+d}" if self.offset else "")
        else:
            place = "-1" if current == self.dummy_address else f"0x{current:x}"
        head = f"w{self.slots or ''}:{self.group}/{self.event}"
        words = [head, f"{self.access}{'!' if self.changes else ''}@{place}:{self.length}"]
        return " ".join(words + [f"{arg.name}={arg.text}" for arg in self.args])

    @property
    def unresolved(self) -> bool:
        """Does an argument name a symbol the guest does not have? Then it cannot be enabled."""
        return any(arg.unresolved for arg in self.args)

    def off_limits(self) -> ProbeError:
        """The error for an address that may not be watched."""
        column = self.line.index("@") + 1
        return ProbeError(errno.EINVAL, LogEntry(WPROBE, errors.OFF_LIMITS, self.line, column))

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


def parse(
    line: str, symbols: Symbols, structs: Structs | None = None, *, extended: bool = False, per_cpu: bool = True
) -> Definition:
    """Parse a line whose first word starts with `w`. Raises `ProbeError`.

    `per_cpu`: the guest's kernel knows this_cpu_read() and this_cpu_ptr().
    """
    found = structs or NoStructs()
    guest = Guest(found, lambda name: symbols.lookup(name) is not None, extended, per_cpu)
    return _Parser(split_words(line), symbols, guest).parse()


class _Spec(NamedTuple):
    access: Access
    changes: bool
    symbol: str | None
    offset: int
    address: int
    dummy: bool
    length: int


class _Parser:
    def __init__(self, words: list[str], symbols: Symbols, guest: Guest) -> None:
        self._words = words
        self._line = " ".join(words)
        self._symbols = symbols
        self._extended = guest.extended
        self._guest = guest

    def _refuse(self, text: str, column: int, number: int = errno.EINVAL) -> NoReturn:
        raise ProbeError(number, LogEntry(WPROBE, text, self._line, column))

    def parse(self) -> Definition:
        if len(self._words) < 2:
            self._refuse(errors.NO_ARG_BODY, 0)
        head, spec, *args = self._words
        slots, column = self._slots(head)
        found = self._spec(spec, len(head) + 1)
        group, event = self._names(head[column:], column) if len(head) > 1 else (DEFAULT_GROUP, "")
        if not event:
            event = re.sub(r"[^A-Za-z0-9_]", "_", found.symbol or f"w_0x{found.address:x}")
            event = event[: _MAX_NAME - 1]
        if len(args) > _MAX_ARGS:
            self._refuse(errors.TOO_MANY_ARGS, len(head) + len(spec) + 2, errno.E2BIG)
        parsed = self._args(args, len(head) + len(spec) + 2)
        return Definition(
            group=group,
            event=event,
            **found._asdict(),
            args=parsed,
            line=self._line,
            dummy_address=self._symbols.dummy,
            slots=slots,
        )

    def _slots(self, head: str) -> tuple[int, int]:
        """The number of slots, and the column where the name begins."""
        number, colon, _ = head[1:].partition(":")
        if not number:
            return 0, 2
        if not self._extended or not colon or not re.fullmatch("[0-9]+", number):
            self._refuse(errors.NO_MAXACT, 1)
        slots = kstrtoint(number)
        if slots is None or number[0] == "0" or slots > MAX_SLOTS:
            self._refuse(errors.BAD_SLOTS, 1)
        return slots, len(number) + 2

    def _spec(self, spec: str, start: int) -> _Spec:
        access, at, _ = spec.partition("@")
        column = start + len(access) + 1
        if not at:
            self._refuse(errors.BAD_ACCESS_FMT, start)
        changes = self._extended and access in ("!", "r!", "w!", "rw!")
        if changes and access != "w!":
            self._refuse(errors.BAD_CHANGE, start)
        if not changes and access not in ("", "r", "w", "rw"):
            self._refuse(errors.BAD_ACCESS_TYPE, start)
        before, colon, size = spec.partition(":")
        length = kstrtoint(size) if colon else 4
        if length is None or not (0 < length <= MAX_LENGTH if self._extended else length in _LENGTHS):
            self._refuse(errors.BAD_ACCESS_LEN, start + len(before) + 1)

        place = before[len(access) + 1 :]
        symbol, offset = None, 0
        dummy = place == "-1" or (self._extended and spec == _EARLIER_DUMMY)
        address = self._symbols.dummy if dummy else kstrtoul(place)
        if address is None:
            symbol, offset = self._offset(place, column)
            base = self._symbols.lookup(symbol) if symbol else None
            if base is None:
                self._refuse(errors.BAD_ACCESS_ADDR, column, errno.ENOENT)
            address = (base + offset) % (1 << 64)
        aligned = address + length <= 1 << 64 if self._extended else address % length == 0
        if address < TASK_SIZE or not aligned:
            self._refuse(errors.BAD_ACCESS_ADDR, column)
        return _Spec(cast(Access, access.rstrip("!") or "rw"), changes, symbol, offset, address, dummy, length)

    def _offset(self, place: str, column: int) -> tuple[str, int]:
        found = re.search(r"[+-]", place)
        if not found:
            return place, 0
        offset = kstrtoint(place[found.start() :])
        if offset is None:
            self._refuse(errors.BAD_PROBE_ADDR, column + found.start())
        return place[: found.start()], offset

    def _names(self, name: str, column: int) -> tuple[str, str]:
        """Group and event; the event is empty where it is to be made up."""
        group, separator, event = name.partition("/" if "/" in name else ".")
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
            body, unresolved = translate(text, column, self._guest)
        except Refused as refused:
            self._refuse(refused.text, refused.column, refused.number)
        named = Piece(start, column - start, f"{name}=", column > start)
        _, colon, suffix = text.partition(":")
        return Arg(name, text, colon + suffix, (Piece(start - 1, 1, " ", True), named, *body), unresolved)
