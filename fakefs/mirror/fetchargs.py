"""What memory the arguments of a uprobe look at, so that it can be shown to the guest that evaluates them.

Arguments are as the kernel lists them in uprobe_events: `name=+8(+0(%di)):string`. Nothing is judged here: what is not
understood looks at nothing. Follows Documentation/trace/uprobetracer.rst and kernel/trace/trace_probe.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

STRING_MAX = 4096
ARRAY_MAX = 64
_DEPTH_MAX = 16
_WORD = 8
_MASK = (1 << 64) - 1
_ARGUMENT = re.compile(r"[^=]*=(?P<fetch>.*?)(?::(?P<type>\w+(?:@\d+/\d+)?)(?:\[(?P<count>\d+)\])?)?", re.DOTALL)
_DEREFERENCE = re.compile(r"(?P<sign>[+-])u?(?P<offset>0[xX][0-9a-fA-F]+|\d+)\((?P<inner>.*)\)", re.DOTALL)
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|\d+")

Read = Callable[[int, int], bytes]
"""Return what is there of so many bytes at an address."""


class Memory:
    """What has been looked at: pieces by their addresses, no more than `most` bytes in all."""

    def __init__(self, read: Read, most: int) -> None:
        self._read = read
        self._left = most
        self.pieces: dict[int, bytes] = {}

    def look(self, address: int, size: int) -> bytes:
        """Return what is at an address, and keep it."""
        data = self._read(address & _MASK, min(size, self._left)) if self._left > 0 else b""
        if data and len(data) > len(self.pieces.get(address, b"")):
            self.pieces[address] = data
            self._left -= len(data)
        return data

    def look_at_string(self, address: int) -> None:
        """Look at a string, up to the NUL behind it."""
        at = 0
        while at < STRING_MAX:
            size = min(64, STRING_MAX - at)
            data = self.look(address + at, size)
            if len(data) < size or b"\0" in data:
                return
            at += size


def look(arguments: Iterable[str], registers: Mapping[str, int], base: int, memory: Memory) -> None:
    """Look at all that arguments look at. `base` is the address at which byte 0 of the file would be mapped."""
    for argument in arguments:
        match = _ARGUMENT.fullmatch(argument)
        if match is None:
            continue
        kind, count = match["type"] or "", min(int(match["count"] or 0), ARRAY_MAX)
        outer = _DEREFERENCE.fullmatch(match["fetch"])
        is_string = kind in ("string", "ustring")
        address = _address(match["fetch"], outer, registers, base, memory)
        if address is None:
            value = _value(match["fetch"], registers, base, memory, 0)
            if is_string and value is not None:
                memory.look_at_string(value)
        elif not is_string:
            memory.look(address, max(count, 1) * _WORD)
        elif not count:
            memory.look_at_string(address)
        else:
            pointers = memory.look(address, count * _WORD)
            for at in range(0, len(pointers) - 7, _WORD):
                memory.look_at_string(int.from_bytes(pointers[at : at + _WORD], "little"))


def _address(
    fetch: str, outer: re.Match[str] | None, registers: Mapping[str, int], base: int, memory: Memory
) -> int | None:
    """Return the address of an argument that is in memory."""
    if outer is not None:
        inner = _value(outer["inner"], registers, base, memory, 1)
        return None if inner is None else inner + _offset(outer) & _MASK
    if fetch.startswith("@"):
        return _place(fetch[1:], base)
    return None


def _value(fetch: str, registers: Mapping[str, int], base: int, memory: Memory, depth: int) -> int | None:
    """Return what an argument fetches, None when that is not known."""
    if depth > _DEPTH_MAX:
        return None
    stack = registers["sp"]
    if fetch.startswith("%"):
        return registers.get(fetch[1:])
    if fetch == "$retval":
        return registers["ax"]
    if fetch == "$stack":
        return stack
    if fetch.startswith("$stack") and fetch[6:].isdecimal():
        return _word(stack + _WORD * min(int(fetch[6:]), STRING_MAX), memory)
    if fetch.startswith("@"):
        place = _place(fetch[1:], base)
        return None if place is None else _word(place, memory)
    match = _DEREFERENCE.fullmatch(fetch)
    if match is None:
        return None
    inner = _value(match["inner"], registers, base, memory, depth + 1)
    return None if inner is None else _word(inner + _offset(match) & _MASK, memory)


def _word(address: int, memory: Memory) -> int | None:
    data = memory.look(address, _WORD)
    return int.from_bytes(data, "little") if len(data) == _WORD else None


def _place(text: str, base: int) -> int | None:
    """Return the address that @ADDRESS or @+OFFSET, of a byte of the file, means."""
    start = base if text.startswith("+") else 0
    number = text.removeprefix("+")
    return start + int(number, 0) & _MASK if _NUMBER.fullmatch(number) and not re.fullmatch("0\\d+", number) else None


def _offset(match: re.Match[str]) -> int:
    text = match["offset"]
    value = int(text, 16) if text[:2] in ("0x", "0X") else int(text)
    return -value if match["sign"] == "-" else value
