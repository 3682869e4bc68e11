"""`set_wprobe` and `clear_wprobe`: triggers that point a wprobe at what an event's field holds, and away again.

    set_wprobe:EVENT:FIELD[+-ADJ][:COUNT|:count=COUNT|:unlimited] [if FILTER]
    clear_wprobe:EVENT[:FIELD[+-ADJ]][:COUNT...] [if FILTER]

FIELD may be a typecast, `(STRUCT[,ASGN])FIELD->MEMBER[.SUB...]`: nothing but an offset to add, and read back as one.
A leading `!` removes. FILTER is the guest's to judge. Follows the wprobe series, v18. With `extended` more is accepted:

    set_wprobe:EVENT:FIELD[+-ADJ][:COUNT...][:timeout=TIME] [if FILTER]     TIME is a number with ns, us, ms or s

and triggers on kprobe events, and any number of set triggers for a wprobe with slots.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, cast

from fakefs.wprobe import errors
from fakefs.wprobe.errors import WPROBE_TRIGGER, LogEntry, ProbeError
from fakefs.wprobe.kstrto import kstrtol, kstrtoul
from fakefs.wprobe.typecast import NoStructs, Structs

Kind = Literal["set", "clear"]

_COMMAND = re.compile(r"(!?)((set|clear)_wprobe)(?:[: \t]\s*|$)")
_BLANKS = " \t\n\v\f\r\xa0"
_POINTER_SIZE = 8


class Target(Protocol):
    """What a trigger wants to know of its wprobe."""

    @property
    def in_use(self) -> bool:
        """Whether it is enabled in any way that forbids another set trigger, soft-enabled by one included."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger as written. `target` is an event of the group `wprobes`; no `count` means any number of times."""

    kind: Kind
    target: str
    field: str | None
    adjust: int = 0
    count: int | None = None
    filter: str | None = None
    remove: bool = False
    timeout: int = 0  # virtual ns until what it has armed is cleared again; 0: never

    def show(self, missed: int = 0, count: int | None = None, slots: str = "") -> str:
        """Its line in the trigger file. `count` is how often it can still act; the others are its wprobe's comments."""
        left = self.count if count is None else count
        words = [f"{self.kind}_wprobe", self.target]
        if self.field is not None:
            words.append(f"{self.field}{self.adjust:+d}")
        words.append("unlimited" if left is None else f"count={left}")
        if self.timeout:
            words.append(f"timeout={_show_time(self.timeout)}")
        condition = f" if {self.filter}" if self.filter is not None else ""
        comment = " ".join([*([slots] if slots else []), *([f"missed: {missed}"] if missed else [])])
        return ":".join(words) + condition + (f" # {comment}" if comment else "")


_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_TIME = re.compile(r"timeout=([1-9][0-9]{0,17})(ns|us|ms|s)")
_TIME_MAX = 1 << 62


def _show_time(ns: int) -> str:
    unit = next(unit for unit in reversed(_UNITS) if ns % _UNITS[unit] == 0)
    return f"{ns // _UNITS[unit]}{unit}"


def parse(
    written: str,
    fields: Mapping[str, tuple[int, int]],
    target: Callable[[str], Target | None],
    *,
    structs: Structs | None = None,
    on_kprobe: bool = False,
    extended: bool = False,
) -> Trigger | None:
    """Parse what was written to a trigger file, or None if that is not a trigger of these two kinds.

    `fields` are those of the trigger file's event, the common ones included: name to (offset, size) in bytes.
    `target` finds a wprobe of the group `wprobes` by its event name. `on_kprobe` refuses. Raises `ProbeError`.
    """
    line = written.partition("\0")[0].partition("#")[0].strip(_BLANKS)
    command = _COMMAND.match(line)
    if command is None:
        return None
    parser = _Parser(line, fields, structs or NoStructs(), extended)
    return parser.parse(command, target, on_kprobe)


class _Parser:
    def __init__(self, line: str, fields: Mapping[str, tuple[int, int]], structs: Structs, extended: bool) -> None:
        self._line = line
        self._extended = extended
        self._shown = line  # as far as the kernel's parser has put no NUL into it yet
        self._fields = fields
        self._structs = structs

    def _refuse(self, text: str, column: int, number: int = errno.EINVAL) -> NoReturn:
        raise ProbeError(number, LogEntry(WPROBE_TRIGGER, text, self._shown, column))

    def parse(self, command: re.Match[str], target: Callable[[str], Target | None], on_kprobe: bool) -> Trigger:
        start = command.end()
        kind = cast(Kind, command[3])
        remove = bool(command[1])
        if start == len(self._line):
            self._shown = self._line[: command.end(2)]
            self._refuse(errors.WPROBE_NOT_FOUND, command.end(2) + 1)
        parameter, condition = self._split(start)
        self._shown = self._line[: start + len(parameter)]
        if on_kprobe:
            self._refuse(errors.WPROBE_ON_KPROBE, 0, errno.EOPNOTSUPP)
        name, colon, rest = parameter.partition(":")
        self._shown = self._line[: start + len(name)]
        found = target(name)
        if found is None:
            self._refuse(errors.WPROBE_NOT_FOUND, start, errno.ENOENT)
        if kind == "set" and not remove and found.in_use:
            self._refuse(errors.WPROBE_BUSY, start, errno.EBUSY)

        column = start + len(name) + 1
        text, second, number = rest.partition(":")
        field: str | None = None
        adjust = 0
        if kind == "clear" and (not colon or self._is_count(text)):
            number, second, count_column = text, colon, column
        elif not colon:
            self._refuse(errors.WPROBE_NEED_FIELD, start + len(parameter))
        else:
            field, adjust = self._field(text, column)
            count_column = column + len(text) + 1
        count, timeout = None, 0
        if second and not remove:
            with_timeout = self._extended and kind == "set"
            count, timeout = (self._options if with_timeout else self._only_count)(number, count_column)
        return Trigger(kind, name, field, adjust, count, None if remove else self._filter(condition), remove, timeout)

    def _split(self, start: int) -> tuple[str, str]:
        """The parameter, and what follows it after blanks."""
        found = re.compile(r"[ \t]+").search(self._line, start)
        if found is None:
            return self._line[start:], ""
        return self._line[start : found.start()], self._line[found.end() :]

    def _is_count(self, text: str) -> bool:
        """Whether the first parameter of a clear is a count: whatever is no name and no typecast, and two words."""
        if not re.match(r"[A-Za-z_(]", text):
            return True
        return text.startswith(("count=", "unlimited")) and re.split(r"[+-]", text)[0] not in self._fields

    def _only_count(self, text: str, column: int) -> tuple[int | None, int]:
        """As in the series, to which nothing behind the count means anything."""
        return self._count(text.partition(":")[0], column), 0

    def _options(self, text: str, column: int) -> tuple[int | None, int]:
        """A count, a timeout, or one behind the other."""
        count, timeout = None, 0
        for number, word in enumerate(text.split(":")):
            if word.startswith("timeout=") and not timeout:
                timeout = self._timeout(word, column)
            elif number == 0:
                count = self._count(word, column)
            else:
                self._refuse(errors.BAD_TIMEOUT, column)
            column += len(word) + 1
        return count, timeout

    def _timeout(self, word: str, column: int) -> int:
        found = _TIME.fullmatch(word)
        timeout = int(found[1]) * _UNITS[found[2]] if found else 0
        if not 0 < timeout < _TIME_MAX:
            self._refuse(errors.BAD_TIMEOUT, column)
        return timeout

    def _count(self, text: str, column: int) -> int | None:
        if text == "unlimited":
            return None
        count = kstrtoul(text.removeprefix("count="))
        if count is None:
            self._refuse(errors.BAD_IMM, column)
        return count

    def _filter(self, condition: str) -> str | None:
        if not condition:
            return None
        word, _, text = condition.replace("\t", " ", 1).partition(" ")
        if word != "if" or not text:
            raise ProbeError(errno.EINVAL)
        return text

    def _field(self, text: str, column: int) -> tuple[str, int]:
        if text.startswith("("):
            name, adjust, column = self._typecast(text, column)
        else:
            name, adjust = self._adjust(text, column)
        place = self._fields.get(name)
        if place is None:
            self._refuse(errors.NO_EVENT_FIELD, column, errno.ENOENT)
        if place[1] != _POINTER_SIZE:
            self._refuse(errors.WPROBE_BAD_FIELD, column, errno.ENOEXEC)
        return name, adjust

    def _adjust(self, text: str, column: int) -> tuple[str, int]:
        found = re.search(r"[+-]", text)
        if not found:
            return text, 0
        adjust = kstrtol(text[found.start() :])
        if adjust is None:
            self._refuse(errors.BAD_DEREF_OFFS, column + found.start())
        return text[: found.start()], adjust

    def _typecast(self, text: str, column: int) -> tuple[str, int, int]:
        """The event's field, the offset to add, and the column of the field."""
        cast_to, close, rest = text[1:].partition(")")
        if not close:
            self._refuse(errors.DEREF_OPEN_BRACE, column + 1)
        field_column = column + len(cast_to) + 2
        field, arrow, path = rest.partition("->")
        if not arrow:
            self._refuse(errors.TYPECAST_REQ_FIELD, field_column)

        struct, comma, anchor = cast_to.partition(",")
        member_column = field_column + len(field) + 2
        member, adjust = self._adjust(path, member_column)
        if not self._structs.known(struct):
            self._refuse(errors.BAD_BTF_TID, column + 1, errno.ENOENT)
        adjust += self._offset(struct, member, member_column)
        if comma:
            adjust -= self._offset(struct, anchor, column + 2 + len(struct))
        return field, adjust, field_column

    def _offset(self, struct: str, path: str, column: int) -> int:
        member = self._structs.member(struct, path)
        if member is None:
            self._refuse(errors.NO_BTF_FIELD, column, errno.ENOENT)
        if member.bitfield:
            self._refuse(errors.NO_BTF_FIELD, column)
        return member.offset
