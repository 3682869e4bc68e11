"""How the kernel reads numbers and words: kstrtol and argv_split, not Python's int() and str.split().

Base 0 throughout: `0x` is hexadecimal, a leading `0` octal, else decimal. No blanks, no underscores, nothing after it.
Follows Documentation/core-api/kernel-api.rst, "kstrto*".
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*)")
_WORD = re.compile(r"[^ \t\n\v\f\r\xa0\0]+")  # the kernel's isspace() also holds for the no-break space
_LONGEST = 80  # characters; 2**64 has 22 octal digits, and zeros in front of them are not worth a long int()


def split_words(line: str) -> list[str]:
    """The words of a command, as argv_split gives them."""
    return _WORD.findall(line.partition("\0")[0])


def _magnitude(text: str) -> int | None:
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    hexadecimal, octal, decimal = found.groups()
    if hexadecimal is not None:
        return int(hexadecimal, 16)
    return int(octal or "0", 8) if octal is not None else int(decimal)


def kstrtoul(text: str) -> int | None:
    """An unsigned long, or None. One `+` may stand before it."""
    value = _magnitude(text.removeprefix("+"))
    return value if value is not None and value < 1 << 64 else None


def kstrtol(text: str, bits: int = 64) -> int | None:
    """A signed integer of `bits`, or None. One sign may stand before it."""
    negative = text.startswith("-")
    value = _magnitude(text[1:] if text[:1] in ("+", "-") else text)
    if value is None or value >= (1 << bits - 1) + negative:
        return None
    return -value if negative else value


def kstrtoint(text: str) -> int | None:
    """An int (32 bits), or None."""
    return kstrtol(text, 32)
