"""A wprobe's fetch arguments, said again as those of its carrier kprobe.

The carrier's record is made from a `pt_regs` some members of which hold what is known of the hit (emulator/native/
redirect.h), hence

    $addr                          %orig_ax           the watched address
    $value                         +0(%orig_ax):x64   what is there now
    (STRUCT[,FIELD])$addr->member  +OFFSET(%orig_ax):TYPE

and, where more is accepted than the series does,

    $old                           %r8                what was there before
    $at                            %r11               the first watched byte that was accessed
    $size                          %r9:u32            bytes accessed
    $access                        +0(%r14):string    "r", "w" or "rw"

and all else stays as it was typed, but for `@SYMBOL` of a symbol that is not there: the series accepts it and refuses
to enable the event. Refused here is only what means something else, or nothing, on a kprobe; the guest's
own parser judges the rest (types, symbols, immediates). For its answer to make sense to the user, a translation
remembers which part of the typed text each part of it comes from.
Syntax: Documentation/trace/kprobetrace.rst and fprobetrace.rst.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fakefs.wprobe import errors
from fakefs.wprobe.kstrto import kstrtol
from fakefs.wprobe.typecast import Structs


class _Variable(NamedTuple):
    """What stands for a `$` variable, and the type it has alone; `value`: it may be used as an address."""

    text: str
    type: str | None = None
    value: bool = True


_SERIES = {"$addr": _Variable("%orig_ax"), "$value": _Variable("+0(%orig_ax)", "x64")}
_EXTENDED = _SERIES | {
    "$old": _Variable("%r8", "x64"),
    "$at": _Variable("%r11", "x64"),
    "$size": _Variable("%r9", "u32", False),
    "$access": _Variable("+0(%r14)", "string", False),
}
_SYMBOL = re.compile(r"@([A-Za-z_][\w.$]*)(?:[+-]|\Z)", re.ASCII)
_PER_CPU = re.compile(r"this_cpu_(?:read|ptr)\(")
_MAX_NESTING = 16  # braces; the guest refuses long before that: a fetch argument has at most 16 instructions


class Refused(Exception):
    """An argument not to be had: an error text, its column and an errno."""

    def __init__(self, text: str, column: int, number: int = errno.EINVAL) -> None:
        super().__init__(text)
        self.text = text
        self.column = column
        self.number = number


class Piece(NamedTuple):
    """`text` of the carrier's command line that stands for the `typed` characters at column `start` of the user's."""

    start: int
    typed: int
    text: str
    verbatim: bool


@dataclass(frozen=True, slots=True)
class Pieces:
    """A translated line, as the pieces it consists of in order."""

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def to_user(self, column: int) -> int:
        """The user's column for one of the translation: within a translated piece, that of its start."""
        user = 0
        for piece in self.pieces:
            if column < len(piece.text):
                return piece.start + (column if piece.verbatim else 0)
            column -= len(piece.text)
            user = piece.start + piece.typed
        return user + column

    def to_carrier(self, column: int) -> int:
        """The translation's column for one of the user's: the other way round."""
        carrier = 0
        for piece in self.pieces:
            if piece.start <= column < piece.start + piece.typed:
                return carrier + (column - piece.start if piece.verbatim else 0)
            carrier += len(piece.text)
        end = self.pieces[-1].start + self.pieces[-1].typed if self.pieces else 0
        return carrier + max(0, column - end)


@dataclass(frozen=True, slots=True)
class Guest:
    """What there is in the guest: its structures, and whether it has a symbol; `extended` is more than the series.

    `per_cpu`: its kernel knows this_cpu_read() and this_cpu_ptr(), which came with 7.3.
    """

    structs: Structs
    has_symbol: Callable[[str], bool]
    extended: bool = False
    per_cpu: bool = True


class Translated(NamedTuple):
    """An argument as the carrier has it; `unresolved`: it names a symbol the guest does not have."""

    pieces: tuple[Piece, ...]
    unresolved: bool


def translate(body: str, start: int, guest: Guest) -> Translated:
    """Translate the argument `body` (no name, type included), which stands at column `start` of the user's line.

    Raises `Refused`, whose column is one of that line.
    """
    expression, colon, kind = body.partition(":")
    if not guest.extended and (expression, kind) == ("$addr", "symstr"):  # to us the symbol that is watched
        raise Refused(errors.BAD_SYMSTRING, start + len(expression) + 1)
    translation = _Translation(body, start, guest)
    translation.operand(0, len(expression), 0)
    if colon:
        translation.copy(len(expression), len(body))
    elif translation.fetch_type:
        translation.replace(len(body), len(body), f":{translation.fetch_type}")
    return Translated(tuple(translation.pieces), translation.unresolved)


class _Translation:
    """One argument on its way. Columns are those of its body."""

    def __init__(self, body: str, start: int, guest: Guest) -> None:
        self._body = body
        self._start = start
        self._structs = guest.structs
        self._has_symbol = guest.has_symbol
        self._per_cpu = guest.per_cpu
        self._variables = _EXTENDED if guest.extended else _SERIES
        self.unresolved = False
        self.pieces: list[Piece] = []
        self.fetch_type: str | None = None  # of the whole argument, if it is ours to say

    def copy(self, begin: int, end: int) -> None:
        if begin < end:
            self.pieces.append(Piece(self._start + begin, end - begin, self._body[begin:end], True))

    def replace(self, begin: int, end: int, text: str) -> None:
        self.pieces.append(Piece(self._start + begin, end - begin, text, False))

    def operand(self, begin: int, end: int, depth: int) -> None:
        """What stands at the top of an argument or between a dereference's braces."""
        first = self._body[begin : begin + 1] if begin < end else ""
        if depth > _MAX_NESTING:
            raise self._refused(errors.DEREF_OPEN_BRACE, begin, errno.E2BIG)
        if first in ("$", "%"):
            self._variable(begin, end, depth)
        elif first == "(":
            self._typecast(begin, end, depth)
        elif first in ("+", "-"):
            self._dereference(begin, end, depth)
        elif found := _PER_CPU.match(self._body, begin, end):
            if not self._per_cpu:
                raise self._refused(errors.NO_PER_CPU, begin)
            self._within(begin, found.end(), end, depth)
        elif first.isascii() and (first.isalpha() or first == "_"):
            raise self._refused(errors.NOSUP_BTFARG, begin)
        elif (found := _SYMBOL.match(self._body[begin:end])) and not self._has_symbol(found[1]):
            self.unresolved = True
            self.replace(begin, end, "@0xffffffffffffffff")
        else:
            self.copy(begin, end)

    def _refused(self, text: str, column: int, number: int = errno.EINVAL) -> Refused:
        return Refused(text, self._start + column, number)

    def _variable(self, begin: int, end: int, depth: int) -> None:
        variable = self._variables.get(self._body[begin:end])
        if variable is None or (depth and not variable.value):
            raise self._refused(errors.BAD_VAR, begin)
        self.replace(begin, end, variable.text)
        if not depth:
            self.fetch_type = variable.type

    def _dereference(self, begin: int, end: int, depth: int) -> None:
        brace = self._body.find("(", begin, end)
        if brace < 0:
            raise self._refused(errors.DEREF_NEED_BRACE, begin)
        offset = self._body[begin:brace]
        if offset[1:2] == "u":
            offset = offset[0] + offset[2:]
        if kstrtol(offset) is None:
            self.copy(begin, end)  # the guest will refuse it, at the column it finds right
        else:
            self._within(begin, brace + 1, end, depth)

    def _within(self, begin: int, inner: int, end: int, depth: int) -> None:
        close = self._body.rfind(")", inner, end)
        if close < 0:
            raise self._refused(errors.DEREF_OPEN_BRACE, end)
        self.copy(begin, inner)
        self.operand(inner, close, depth + 1)
        self.copy(close, end)

    def _typecast(self, begin: int, end: int, depth: int) -> None:
        close = self._body.find(")", begin, end)
        if close < 0:
            raise self._refused(errors.DEREF_OPEN_BRACE, begin + 1)
        arrow = self._body.find("->", close, end)
        base = self._body[close + 1 : arrow if arrow >= 0 else end]
        variable = self._variables.get(base)
        if variable is None or not variable.value:
            bare = base[:1].isascii() and (base[:1].isalpha() or base[:1] == "_")
            raise self._refused(errors.NOSUP_BTFARG if bare else errors.BAD_VAR, close + 1)
        if arrow < 0:
            raise self._refused(errors.TYPECAST_REQ_FIELD, end)

        struct, comma, field = self._body[begin + 1 : close].partition(",")
        if not self._structs.known(struct):
            raise self._refused(errors.BAD_BTF_TID, begin + 1, errno.ENOENT)
        back = 0
        if comma:
            anchor = self._structs.member(struct, field)
            if anchor is None:
                raise self._refused(errors.NO_BTF_FIELD, begin + 2 + len(struct), errno.ENOENT)
            back = anchor.offset

        text = variable.text
        column = arrow + 2
        pointee: str | None = struct
        for path in self._body[column:end].split("->"):
            if pointee is None:
                raise self._refused(errors.NO_PTR_STRCT, column)
            member = self._structs.member(pointee, path) if self._structs.known(pointee) else None
            if member is None:
                raise self._refused(errors.NO_BTF_FIELD, column, errno.ENOENT)
            text = f"{member.offset - back:+d}({text})"
            back = 0
            column += len(path) + 2
            pointee = member.pointee
            if not depth:
                self.fetch_type = member.fetch_type
        self.replace(begin, end, text)
