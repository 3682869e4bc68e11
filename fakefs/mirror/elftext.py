"""The code in an ELF file: its segments, and which instructions a jump may replace.

A jump is longer than most instructions. What it replaces can be more than one, and then nothing may lead into the
middle of them: no branch in the function nor from elsewhere in the segment, and no jump by a table. Where functions
begin is taken from .eh_frame_hdr, which stripped files have too, or else from the symbols. Follows elf(5) and the Linux
Standard Base on exception frames. All that is read is checked; what is odd makes an instruction NotMovable.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from fakefs.mirror.trampoline import CODE_MAX, JUMP_SIZE, NotMovable, disassembler, window

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_MACHINE_X86_64 = 62
_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_PF_X = 1
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_STT_FUNC = 2
_EH_ENCODINGS = b"\x01\x1b\x03\x3b"
"""Version 1; the encodings that linkers for x86-64 use: a table of pairs of words relative to its section."""
_FUNCTION_MAX = 1 << 18
_FAR = 1 << 20
"""Bytes on both sides of an instruction in which branches to it are looked for."""
_SHORT = 130
"""A branch of two bytes goes no farther."""
_FAR_BRANCH = re.compile(rb"(?:\xe9|\x0f[\x80-\x8f])(?=(....))", re.DOTALL)


class Segment(NamedTuple):
    """One that is loaded, with code in it. Addresses are those that the file has been linked for."""

    offset: int
    address: int
    size: int


class ElfText:
    """What is said of a file in `data`, or at its beginning: 4096 bytes are enough for `segments`.

    Raises ValueError when it is no program or library for x86-64.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            header = _HEADER.unpack_from(data)
            ident, _, machine, _, self._entry, phoff, self._shoff, _, _, phentsize, phnum, _, self._shnum, _ = header
            if ident[:6] != b"\x7fELF\x02\x01" or machine != _MACHINE_X86_64 or phentsize != _SEGMENT.size:
                raise ValueError("not ELF for x86-64")
            self._headers = [_SEGMENT.unpack_from(data, phoff + index * phentsize) for index in range(phnum)]
        except (struct.error, OverflowError):
            raise ValueError("cut short") from None
        self.segments = [
            Segment(offset, address, size)
            for kind, flags, offset, address, _, size, _, _ in self._headers
            if kind == _PT_LOAD and flags & _PF_X
        ]

    def segment(self, offset: int) -> Segment | None:
        """Return the code segment that a byte of the file is in."""
        return next((each for each in self.segments if 0 <= offset - each.offset < each.size), None)

    def replaceable(self, offset: int) -> int:
        """Return how many bytes a jump at an instruction, whose place in the file is given, would replace.

        Raises NotMovable. The whole file is needed.
        """
        segment = self.segment(offset)
        if segment is None:
            raise NotMovable("not code")
        end = segment.offset + segment.size
        size = window(self._data[offset : min(offset + CODE_MAX, end)])
        address = offset - segment.offset + segment.address
        first = next(disassembler().disasm_lite(self._data[offset : offset + CODE_MAX], address))
        if first[1] < JUMP_SIZE:
            self._check_middle(segment, address, address + size)
        return size

    def _check_middle(self, segment: Segment, start: int, end: int) -> None:
        """Raise NotMovable if anything may lead to behind `start` and before `end`."""
        self._check_function(segment, start, end)
        near = max(0, start - _FAR - segment.address)
        code = self._data[segment.offset : segment.offset + segment.size][near : near + 2 * _FAR]
        for branch in _FAR_BRANCH.finditer(code):
            target = segment.address + near + branch.end() + 4 + struct.unpack("<i", branch[1])[0]
            if start < target < end:
                raise NotMovable("a branch leads behind it")

    def _check_function(self, segment: Segment, start: int, end: int) -> None:
        starts = sorted({*self._functions(), self._entry})
        at = bisect_right(starts, start)
        if at == 0 or starts[at - 1] < segment.address:
            raise NotMovable("in no known function")
        begin = starts[at - 1]
        limit = min(starts[at] if at < len(starts) else segment.address + segment.size, begin + _FUNCTION_MAX)
        if end > limit:
            raise NotMovable("too short a function")
        code = self._data[segment.offset + begin - segment.address : segment.offset + limit - segment.address]
        reached, met = begin, begin == start
        for address, size, name, text in disassembler().disasm_lite(code, begin):
            reached, met = address + size, met or address == start
            if name[0] == "j" or name.startswith(("loop", "notrack jmp", "bnd j", "call")):
                if text.startswith("0x"):
                    if start < int(text, 16) < end:
                        raise NotMovable("a branch leads behind it")
                elif begin != start and "call" not in name and "rip" not in text:
                    raise NotMovable("a jump by a table may lead behind it")
        if not met or reached < min(limit, end + _SHORT):
            raise NotMovable("unknown instructions")

    # ---- where functions begin

    def _functions(self) -> list[int]:
        try:
            return self._from_frames() or list(self._from_symbols())
        except (struct.error, OverflowError):
            raise NotMovable("cut short") from None

    def _from_frames(self) -> list[int]:
        for kind, _, offset, address, _, size, _, _ in self._headers:
            if kind == _PT_GNU_EH_FRAME and self._data[offset : offset + 4] == _EH_ENCODINGS:
                [count] = struct.unpack_from("<I", self._data, offset + 8)
                count = min(count, (size - 12) // 8, (len(self._data) - offset - 12) // 8)
                words = struct.unpack_from(f"<{2 * max(count, 0)}i", self._data, offset + 12)
                return [address + word for word in words[::2]]
        return []

    def _from_symbols(self) -> Iterator[int]:
        for index in range(self._shnum):
            section = _SECTION.unpack_from(self._data, self._shoff + index * _SECTION.size)
            if section[1] in (_SHT_SYMTAB, _SHT_DYNSYM):
                table = self._data[section[4] : section[4] + section[5]]
                for _, info, _, defined, value, _ in _SYMBOL.iter_unpack(table[: len(table) // 24 * 24]):
                    if info & 0xF == _STT_FUNC and defined:
                        yield value
