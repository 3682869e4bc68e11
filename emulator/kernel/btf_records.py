"""The records of a BTF blob, checked as they are read: where each type begins, what it is called, what follows it.

What they mean is `emulator.kernel.btf`'s, whose docstring has the format's source, costs and whom to trust.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from typing import Self

from emulator.kernel.btf_types import BtfError, Kind

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
_LAYOUT_HEADER = struct.Struct("<II")  # layout_off, layout_len: only if hdr_len makes room for them (new in Linux 7)
_LAYOUT = struct.Struct("<BBH")  # info_sz, elem_sz, flags of one kind

# 32-bit words that follow the three words every record has: (once, for each of the vlen elements).
_SHAPES: dict[int, tuple[int, int]] = {
    **{int(kind): (0, 0) for kind in Kind if kind},
    Kind.INT: (1, 0),
    Kind.ARRAY: (3, 0),
    Kind.STRUCT: (0, 3),
    Kind.UNION: (0, 3),
    Kind.ENUM: (0, 2),
    Kind.FUNC_PROTO: (0, 2),
    Kind.VAR: (1, 0),
    Kind.DATASEC: (0, 3),
    Kind.DECL_TAG: (1, 0),
    Kind.ENUM64: (0, 3),
}
_KINDS = {int(kind): kind for kind in Kind}


class BtfRecords:
    """The records of one blob, and of the blob it is based on. Type ids go on from those of the base.

    ``data`` may be longer than the blob. A memoryview is copied: the guest cannot change what has been checked.
    Every method raises `BtfError` where it meets a malformed record.
    """

    def __init__(self, data: bytes | memoryview, base: Self | None = None) -> None:
        self.base = base
        self.data = data = bytes(data)  # of bytes no copy
        if len(data) < _HEADER.size:
            raise BtfError(f"BTF ends after {len(data)} bytes, within its header")
        magic, version, _flags, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, 1):
            raise BtfError(f"not BTF: magic {magic:#06x}, version {version} instead of {_MAGIC:#06x}, version 1")
        if not _HEADER.size <= header <= len(data) or type_len % 4:
            raise BtfError(f"BTF has a header of {header} bytes and {type_len} bytes of types, which cannot be")

        def section(what: str, offset: int, length: int) -> tuple[int, int]:
            start = header + offset
            if start + length > len(data):
                raise BtfError(f"BTF is cut off: its {what} end at byte {start + length} of {len(data)}")
            return start, start + length

        start, end = section("types", type_off, type_len)
        self.words = memoryview(data)[start:end].cast("I")
        self._strings, self._strings_end = start, end = section("strings", str_off, str_len)
        # Only a module's BTF may have no strings, or a first one that is not empty.
        if (base is None and data[start : min(end, start + 1)] != b"\0") or (str_len and data[end - 1]):
            raise BtfError("BTF's strings do not begin and end with a NUL byte")
        self._first_string: int = 0 if base is None else base._end_of_strings
        self._end_of_strings: int = self._first_string + str_len
        self._shapes = _SHAPES
        if header >= _HEADER.size + _LAYOUT_HEADER.size:
            start, end = section("record layouts", *_LAYOUT_HEADER.unpack_from(data, _HEADER.size))
            shapes = enumerate(_LAYOUT.iter_unpack(data[start : end - (end - start) % _LAYOUT.size]))
            self._shapes = {k: (info // 4, each // 4) for k, (info, each, _) in shapes if k} | _SHAPES

    def __len__(self) -> int:
        """One more than the highest type id, base included."""
        return self.first_id + len(self.starts)

    @cached_property
    def first_id(self) -> int:
        """The id of this blob's first type."""
        return 1 if self.base is None else len(self.base)

    @cached_property
    def starts(self) -> list[int]:
        """Where each record begins, in words. Records have no common size, so this is the one walk over all of them."""
        infos = self.words[1:]  # infos[at] is the info word of a record that begins at word `at`
        lengths: dict[int, int] = {}  # by info word: a few hundred different ones
        starts: list[int] = []
        append = starts.append
        at = 0
        try:
            while True:
                try:
                    while True:
                        length = lengths[infos[at]]
                        append(at)
                        at += length
                except KeyError:
                    lengths[infos[at]] = self._length(infos[at])
        except IndexError:
            if at != len(self.words):
                raise BtfError(f"BTF's last type ends at word {at} of {len(self.words)}") from None
        return starts

    def _length(self, info: int) -> int:
        """Words in a record. Bits of `info`: 0 to 23 vlen (once 15), 24 to 30 kind (once 28), 31 kind_flag."""
        kind = info >> 24 & 0x7F
        if kind not in self._shapes:
            raise BtfError(f"BTF has a type of kind {kind}, which this version does not know")
        once, each = self._shapes[kind]
        return 3 + once + each * (info & 0xFFFFFF)

    @cached_property
    def _names(self) -> bytes:
        """The name offset of every type, packed: a name is found by `bytes.find`."""
        words = self.words
        return struct.pack(f"<{len(self.starts)}I", *map(words.__getitem__, self.starts))

    @cached_property
    def _sorted(self) -> bool:
        """Whether types are in the order of their names, anonymous ones first: judged by 128 samples."""
        names = [self.name_at(at) for at in self.starts[:: len(self.starts) // 128 or 1]]
        return names == sorted(names)

    def record(self, type_id: int) -> tuple[Self, int, Kind]:
        """The blob that holds a type, the word at which its record begins there, and its kind."""
        if type_id <= 0:
            if type_id < 0:
                raise BtfError(f"BTF has no type {type_id}")
            return self, 0, Kind.UNKN
        index = type_id - self.first_id
        if index < 0:
            assert self.base is not None
            return self.base.record(type_id)
        if index >= len(self.starts):
            raise BtfError(f"BTF has no type {type_id}: its last is {len(self) - 1}")
        at = self.starts[index]
        kind = self.words[at + 1] >> 24 & 0x7F
        return self, at, _KINDS.get(kind, Kind.UNKN)

    def elements(self, at: int, width: int) -> Iterator[list[int]]:
        """The vlen elements of a record, `width` words each."""
        vlen = self.words[at + 1] & 0xFFFFFF
        for here in range(at + 3, at + 3 + width * vlen, width):
            yield self.words[here : here + width].tolist()

    def string(self, offset: int) -> str:
        """The string at an offset, in bytes, in the strings of base and blob."""
        if offset < self._first_string:
            assert self.base is not None
            return self.base.string(offset)
        if offset >= self._end_of_strings:
            raise BtfError(f"BTF has a name at byte {offset}, its strings end at {self._end_of_strings}")
        start = self._strings + offset - self._first_string
        return self.data[start : self.data.index(0, start)].decode("utf-8", "surrogateescape")

    def name_at(self, at: int) -> str:
        """The name of the type whose record begins at a word."""
        return self.string(self.words[at])

    def string_offsets(self, name: bytes) -> Iterator[int]:
        """Where a name is in the strings: once in each blob, as every encoder writes them, sharing no tails either."""
        if self.base is not None:
            yield from self.base.string_offsets(name)
        if self.data.startswith(b"%b\0" % name, self._strings, self._strings_end):
            yield self._first_string
        at = self.data.find(b"\0%b\0" % name, self._strings, self._strings_end)
        if at >= 0:
            yield self._first_string + at + 1 - self._strings

    def named(self, name: str) -> Iterator[tuple[int, Kind]]:
        """The types of that name in this blob."""
        if not name or "\0" in name:
            return
        if self._sorted:
            index = bisect_left(self.starts, name, key=self.name_at)
            while index < len(self.starts) and self.name_at(self.starts[index]) == name:
                type_id = self.first_id + index
                yield type_id, self.record(type_id)[2]
                index += 1
            return
        for offset in self.string_offsets(name.encode("utf-8", "surrogateescape")):
            needle = offset.to_bytes(4, "little")
            at = self._names.find(needle)
            while at >= 0:
                if at % 4 == 0:
                    type_id = self.first_id + at // 4
                    yield type_id, self.record(type_id)[2]
                at = self._names.find(needle, at + 1)
