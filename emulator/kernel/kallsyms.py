"""A kernel's symbols: by name, by address, and in a form that loads in milliseconds.

Three sources give the same `Symbols`: the text of /proc/kallsyms or System.map (`parse`), the tables a kernel carries
in its own image to print that text (`from_tables`), and an unstripped vmlinux's ELF .symtab (`from_elf`).

The tables have no header and no ELF symbol points at them in a stripped image, so they are found by what they must look
like, and every guess is checked against the others. Their order is that of Linux's scripts/kallsyms.c: it changed in
6.4 (addresses behind the names instead of before) and in 7.0 (addresses relative to their own place, no base).
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from emulator.errors import EmulatorError
from emulator.kernel.image import START_KERNEL_MAP, KernelImage, Segment

MOST_SYMBOLS = 4 << 20
"""Bound for what is parsed; a distribution kernel with its modules has 150,000 to 300,000."""

_LONGEST = 16 << 20  # bytes: an address further than this behind a symbol is not inside it
_KERNEL_HALF = 1 << 63  # addresses below are not the kernel's: offsets of per-CPU variables have such addresses


class NoSymbols(EmulatorError):
    """No symbols could be had from this source; the message says why."""


class Symbol(NamedTuple):
    """`type` is nm(1)'s letter; `module` is "" for the kernel proper.

    `address` is virtual, but for per-CPU variables before Linux 6.15, where it is the offset in the per-CPU area.
    """

    address: int
    type: str
    name: str
    module: str

    def __str__(self) -> str:
        return f"{self.name} [{self.module}]" if self.module else self.name


class Symbols:
    """Symbols sorted by address; those of one address stay in the order of their source, as the kernel looks them up.

    Names are one text with a line each, "name" or "name\\t[module]" as in /proc/kallsyms: a search for a line is a
    search in that text (0.6 ms for 160,000 symbols), and nothing has to be indexed when a cache is loaded.
    """

    def __init__(self, rows: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Take (address, type letter, line of the name) in the order of the source."""
        ordered = sorted(rows, key=lambda row: row[0])
        self._addresses = array("Q", [row[0] for row in ordered])
        self._types = b"".join([row[1] for row in ordered])
        self._names = b"\n".join([b"", *[row[2] for row in ordered], b""])
        self._starts = _starts(self._names)

    def __len__(self) -> int:
        return len(self._addresses)

    def __iter__(self) -> Iterator[Symbol]:
        return map(self._symbol, range(len(self)))

    def __contains__(self, name: str) -> bool:
        return bool(self.find(name))

    def __getitem__(self, name: str) -> int:
        """The address of the first symbol called `name`, one of the kernel proper if there is one; raises KeyError."""
        found = self.find(name)
        if not found:
            raise KeyError(name)
        return min(found, key=lambda symbol: symbol.module != "").address

    def find(self, name: str) -> list[Symbol]:
        """Every symbol called `name`, by address: static functions of one name are common."""
        line = name.encode("utf-8", "replace")
        if b"\n" in line or b"\t" in line or not line:
            return []
        found: list[Symbol] = []
        start = self._names.find(b"\n" + line)
        while start >= 0:
            if self._names[start + 1 + len(line)] in b"\n\t":
                found.append(self._symbol(bisect_left(self._starts, start + 1)))
            start = self._names.find(b"\n" + line, start + 1)
        return found

    def at(self, address: int) -> tuple[Symbol, int] | None:
        """The symbol that the virtual `address` is in, and the offset in it in bytes; None outside the kernel."""
        index = bisect_right(self._addresses, address) - 1
        if address < _KERNEL_HALF or index < 0 or address - self._addresses[index] >= _LONGEST:
            return None
        if self._addresses[index] < _KERNEL_HALF:
            return None
        index = bisect_left(self._addresses, self._addresses[index])
        return self._symbol(index), address - self._addresses[index]

    def after(self, address: int) -> int:
        """Return the address of the first symbol behind `address`: where the function there ends. Raises KeyError."""
        index = bisect_right(self._addresses, address)
        if index == len(self):
            raise KeyError(address)
        return self._addresses[index]

    def symbolize(self, address: int) -> str:
        """Write `address` as the kernel does, "vfs_read+0x10" or "ext4_sync_file+0x0 [ext4]"; in hex if nameless."""
        found = self.at(address)
        if found is None:
            return f"{address:#x}"
        symbol, offset = found
        return f"{symbol.name}+{offset:#x}" + (f" [{symbol.module}]" if symbol.module else "")

    def _symbol(self, index: int) -> Symbol:
        start = self._starts[index]
        line = self._names[start : self._names.index(b"\n", start)].decode("utf-8", "replace")
        name, _, module = line.partition("\t")
        return Symbol(self._addresses[index], chr(self._types[index]), name, module[1:-1])

    # The cache form: this header, addresses, starts of names, types, names; in the host's byte order.
    _HEADER = struct.Struct("=8sIII")
    _MAGIC = b"kallsym1"

    def to_bytes(self) -> bytes:
        """A form that `from_bytes` reads without parsing, of about 40 bytes a symbol."""
        body = self._addresses.tobytes() + self._starts.tobytes() + self._types + self._names
        return self._HEADER.pack(self._MAGIC, len(self), len(self._names), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, cached: bytes) -> Symbols:
        """Read what `to_bytes` wrote; raises NoSymbols when it is damaged or of another version or machine."""
        if len(cached) < cls._HEADER.size:
            raise NoSymbols("the symbol cache is damaged: delete it")
        magic, count, length, checksum = cls._HEADER.unpack_from(cached)
        body = memoryview(cached)[cls._HEADER.size :]
        if magic != cls._MAGIC or len(body) != count * 13 + length or zlib.crc32(body) != checksum:
            raise NoSymbols("the symbol cache is damaged: delete it")
        symbols = cls.__new__(cls)
        symbols._addresses = array("Q", bytes(body[: count * 8]))
        symbols._starts = array("I", bytes(body[count * 8 : count * 12]))
        symbols._types = bytes(body[count * 12 : count * 13])
        symbols._names = bytes(body[count * 13 :])
        return symbols


def _starts(names: bytes) -> array[int]:
    """Where each line begins in "\\nline\\nline\\n"."""
    starts = array("I", [match.end() for match in re.finditer(b"\n", names)])
    starts.pop()
    return starts


_LINE = re.compile(rb"([0-9a-f]{1,16}) ([!-~]) ([!-~]+(?:\t\[[!-~]+\])?)")


def parse(text: bytes) -> Symbols:
    """Read the text of /proc/kallsyms or System.map; raises NoSymbols."""
    rows: list[tuple[int, bytes, bytes]] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or number > MOST_SYMBOLS:
            raise NoSymbols(f"line {number} is not a line of /proc/kallsyms or System.map: {line[:60]!r}")
        rows.append((int(match[1], 16), match[2], match[3]))
    if not any(row[0] for row in rows):
        raise NoSymbols(
            "every address is 0: they are hidden from this user (sysctl kernel.kptr_restrict)"
            if rows
            else "there is no symbol in it"
        )
    return Symbols(rows)


def from_image(image: KernelImage) -> Symbols:
    """Read the symbols of a kernel image: its .symtab if it has one, else its kallsyms tables; raises NoSymbols."""
    try:
        return from_elf(image.elf)
    except NoSymbols:
        return from_tables(image)


# The tables ----------------------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    """Where the tables about names are in a segment, and what they say; `start` and `end` enclose them all."""

    start: int  # of num_syms
    end: int  # after token_index
    lines: list[bytes]  # type letter and name


def from_tables(image: KernelImage) -> Symbols:
    """Read the kallsyms tables of an image (CONFIG_KALLSYMS); raises NoSymbols."""
    for segment in image.segments:
        for names in _find_names(bytes(segment.data)):
            addresses = _find_addresses(segment, names, image)
            if addresses is not None:
                return Symbols(
                    (address, line[:1], line[1:]) for address, line in zip(addresses, names.lines, strict=True)
                )
    raise NoSymbols(f"{image.path}: no kallsyms tables found: a kernel with CONFIG_KALLSYMS=y is needed")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _find_names(data: bytes) -> Iterator[_Names]:
    for start, tokens, end in _find_tokens(data):
        for markers in _find_markers(data, start):
            found = _find_num_syms(data, markers, tokens)
            if found is not None:
                yield _Names(found[0], end, found[1])


# The 256 tokens that names are made of, NUL-terminated, in the order of the byte that stands for each. A byte that
# occurs in a name stands for itself: digits always do.
_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKEN_INDEX = struct.Struct("<256H")  # the offset of each token in the table


def _find_tokens(data: bytes) -> Iterator[tuple[int, list[bytes], int]]:
    """Yield (offset of token_table, its tokens, offset after token_index).

    Walk from the digits to the end of the table, and let the index behind it tell where the table begins.
    """
    for match in re.finditer(re.escape(_DIGITS), data):
        end = match.start()
        for _ in range(256 - ord("0")):
            end = data.find(b"\0", end) + 1
            if end == 0:
                return
        for position in {_align(end, 4), _align(end, 8), _align(end, 16)}:
            if position + _TOKEN_INDEX.size > len(data):
                continue
            index = _TOKEN_INDEX.unpack_from(data, position)
            start = match.start() - index[ord("0")]
            if start < 0 or index[0] != 0:
                continue
            tokens = data[start:end].split(b"\0")[:-1]
            if len(tokens) == 256 and list(index) == _offsets(tokens):
                yield start, tokens, position + _TOKEN_INDEX.size


def _offsets(tokens: list[bytes]) -> list[int]:
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token) + 1
    return offsets


_MARKED = 256  # every so many names have a marker: the offset of their first in the names


def _find_markers(data: bytes, before: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (offset, markers) of the u32 arrays before `before` that can be the markers, the nearest first.

    They begin with 0 and rise by what 256 compressed names take. Zeros are rare in what is between (numbers of three
    bytes since 6.2, else nothing) and in the markers, so this looks at few places.
    """
    runs = list(re.finditer(rb"\0{4,}", data[max(0, before - (16 << 20)) : before]))
    for run in reversed(runs):
        start = (max(0, before - (16 << 20)) + run.end() - 4) & ~3
        markers = [0]
        for offset in range(start + 4, before - 3, 4):
            value = int.from_bytes(data[offset : offset + 4], "little")
            if not 2 * _MARKED <= value - markers[-1] <= 600 * _MARKED:
                break
            markers.append(value)
        if len(markers) > 1 and data[start : start + 4] == b"\0\0\0\0":
            yield start, markers


def _find_num_syms(data: bytes, found: tuple[int, list[int]], tokens: list[bytes]) -> tuple[int, list[bytes]] | None:
    """The offset of num_syms and the names after it, if names that agree with the markers end where these begin."""
    end, markers = found
    most = len(markers) * _MARKED
    latest = end - markers[-1]
    for start in range(_align(max(0, latest - 600 * _MARKED - 8), 4), latest, 4):
        count = int.from_bytes(data[start : start + 4], "little")
        if not most - _MARKED < count <= most or count > MOST_SYMBOLS:
            continue
        for names in {start + 4, start + 8}:
            lines = _read_names(data, names, end, count, markers, tokens)
            if lines is not None:
                return start, lines
    return None


def _read_names(
    data: bytes, start: int, end: int, count: int, markers: list[int], tokens: list[bytes]
) -> list[bytes] | None:
    """`count` names, each a length (7 bits a byte, at most two) and bytes that stand for tokens; None if not so."""
    lines: list[bytes] = []
    position = start
    token = tokens.__getitem__
    for number in range(count):
        if number % _MARKED == 0 and position - start != markers[number // _MARKED]:
            return None
        if position + 2 > end:
            return None
        length = data[position]
        position += 1
        if length & 0x80:
            length = length & 0x7F | data[position] << 7
            position += 1
        if length == 0:
            return None
        line = b"".join(map(token, data[position : position + length]))
        if len(line) < 2 or b"\n" in line or b"\t" in line:
            return None
        lines.append(line)
        position += length
    return lines if 0 <= end - position < 16 else None


def _find_addresses(segment: Segment, names: _Names, image: KernelImage) -> array[int] | None:
    """Try what kernels were ever built with; accept what is sorted and puts _text at the image's beginning."""
    count = len(names.lines)
    text = next((i for i, line in enumerate(names.lines) if line[1:] in (b"_text", b"_stext")), None)
    low = START_KERNEL_MAP + min(part.paddr for part in image.segments)

    def plausible(addresses: array[int]) -> bool:
        if text is None or not low <= addresses[text] < low + 0x2000:
            return False
        return all(a <= b for a, b in pairwise(addresses))

    def table(position: int) -> array[int] | None:
        if position < 0 or position + 4 * count > len(segment.data):
            return None
        return array("i", bytes(segment.data[position : position + 4 * count]))

    def number(position: int) -> int:
        return int.from_bytes(segment.data[max(0, position) : position + 8], "little")

    after, before = _align(names.end, 8), names.start - 8
    size = _align(4 * count, 8)
    attempts: list[tuple[int, Callable[[array[int]], array[int] | None]]] = [
        (after, lambda offsets: _base_relative(offsets, number(after + size))),
        (names.end, lambda offsets: _place_relative(offsets, START_KERNEL_MAP + segment.paddr + names.end)),
        (before - size, lambda offsets: _base_relative(offsets, number(before))),
    ]
    for position, decode in attempts:
        offsets = table(position)
        addresses = decode(offsets) if offsets is not None else None
        if addresses is not None and plausible(addresses):
            return addresses
    return None


def _base_relative(offsets: array[int], base: int) -> array[int] | None:
    """Before 7.0: offsets from a base.

    With per-CPU variables at addresses from 0 (x86 before 6.15), an offset of 0 or more is itself the address of one,
    and the others, less than 0, count from the base minus 1 (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
    """
    if base < START_KERNEL_MAP:
        return None
    wrap = (1 << 64) - 1
    if min(offsets) < 0:
        return array("Q", [offset if offset >= 0 else base - 1 - offset & wrap for offset in offsets])
    return array("Q", [base + offset & wrap for offset in offsets])


def _place_relative(offsets: array[int], place: int) -> array[int]:
    """Since 7.0: each offset counts from where it is itself, `place` being where the first is."""
    wrap = (1 << 64) - 1
    return array("Q", [place + 4 * i + offset & wrap for i, offset in enumerate(offsets)])


# .symtab -------------------------------------------------------------------------------------------------------------

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_SHT_SYMTAB, _SHT_NOBITS = 2, 8
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_STT_SECTION, _STT_FILE = 3, 4
_STB_WEAK = 2
_SHF_WRITE, _SHF_EXECINSTR = 1, 4


def from_elf(elf: bytes) -> Symbols:
    """Read the .symtab of an x86-64 ELF vmlinux; raises NoSymbols when there is none, as in a vmlinuz."""
    try:
        rows = _symtab(elf)
    except (struct.error, ValueError, IndexError):
        raise NoSymbols("the ELF section headers are damaged") from None
    if not rows:
        raise NoSymbols("the ELF file has no .symtab: it is stripped")
    return Symbols(rows)


def _symtab(elf: bytes) -> list[tuple[int, bytes, bytes]]:
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    (count,) = struct.unpack_from("<H", elf, 0x3C)
    sections = [_SECTION.unpack_from(elf, offset + i * _SECTION.size) for i in range(count)]
    rows: list[tuple[int, bytes, bytes]] = []
    for section in sections:
        if section[1] != _SHT_SYMTAB:
            continue
        table = memoryview(elf)[section[4] : section[4] + section[5] // _SYM.size * _SYM.size]
        strings = sections[section[6]]
        for name, info, _, where, value, _ in _SYM.iter_unpack(table[: MOST_SYMBOLS * _SYM.size]):
            if where == _SHN_UNDEF or info & 15 in (_STT_SECTION, _STT_FILE) or name >= strings[5]:
                continue
            start = strings[4] + name
            line = elf[start : elf.index(b"\0", start)]
            if line and not line.startswith(b".L") and b"\n" not in line and b"\t" not in line:
                rows.append((value, _letter(info >> 4, where, sections), line))
    return rows


def _letter(binding: int, where: int, sections: list[tuple[int, ...]]) -> bytes:
    """nm(1)'s letter."""
    if binding == _STB_WEAK:
        return b"W"
    if where == _SHN_ABS or where >= len(sections):
        letter = b"A"
    elif sections[where][2] & _SHF_EXECINSTR:
        letter = b"T"
    elif sections[where][1] == _SHT_NOBITS:
        letter = b"B"
    else:
        letter = b"D" if sections[where][2] & _SHF_WRITE else b"R"
    return letter if binding else letter.lower()
