"""Write BTF for tests: call a method for each type, in order, then `bytes()` what results.

Every method returns the id of the type it adds. Nothing is checked, so that malformed blobs can be written too: types
may refer to ids that come later or never. The layout of the records follows Linux's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from emulator.kernel.btf import Kind

SIGNED = 1


class BtfWriter:
    """A blob under construction; ``base`` makes it split BTF."""

    def __init__(self, base: BtfWriter | None = None) -> None:
        self._first_id = base.next_id if base else 1
        self._base_strings: dict[str, int] = base.string_offsets if base else {}
        self._first_string = base.end_of_strings if base else 0
        self._strings = bytearray() if base else bytearray(b"\0")
        self._own_strings: dict[str, int] = {} if base else {"": 0}
        self._records: list[bytes] = []

    @property
    def next_id(self) -> int:
        return self._first_id + len(self._records)

    @property
    def string_offsets(self) -> dict[str, int]:
        return self._base_strings | self._own_strings

    @property
    def end_of_strings(self) -> int:
        return self._first_string + len(self._strings)

    def __bytes__(self) -> bytes:
        return self.blob()

    def blob(self, layouts: Iterable[tuple[int, int]] = ()) -> bytes:
        """The finished blob. ``layouts`` adds the record layouts new in Linux 7: (info_sz, elem_sz) of kinds 0, 1…"""
        types = b"".join(self._records)
        layout = b"".join(struct.pack("<BBH", info, each, 0) for info, each in layouts)
        length = 32 if layout else 24
        sections = (0, len(types), len(types) + len(layout), len(self._strings))
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, length, *sections)
        if layout:
            header += struct.pack("<II", len(types), len(layout))
        return header + types + layout + bytes(self._strings)

    def string(self, text: str) -> int:
        """Offset of a string, added if it is new."""
        for known in (self._base_strings, self._own_strings):
            if text in known:
                return known[text]
        offset = self._own_strings[text] = self.end_of_strings
        self._strings += text.encode() + b"\0"
        return offset

    def record(self, kind: int, name: str, third: int, *words: int, vlen: int = 0, flag: bool = False) -> int:
        """Any record: the three common words and what follows them."""
        info = flag << 31 | kind << 24 | vlen
        self._records.append(struct.pack(f"<{3 + len(words)}I", self.string(name), info, third, *words))
        return self.next_id - 1

    def integer(self, name: str, size: int, encoding: int = 0, bits: int | None = None, bit_offset: int = 0) -> int:
        bits = size * 8 if bits is None else bits
        return self.record(Kind.INT, name, size, encoding << 24 | bit_offset << 16 | bits)

    def floating(self, name: str, size: int) -> int:
        return self.record(Kind.FLOAT, name, size)

    def ref(self, kind: Kind, type_id: int, name: str = "", flag: bool = False) -> int:
        """PTR, TYPEDEF, VOLATILE, CONST, RESTRICT or TYPE_TAG."""
        return self.record(kind, name, type_id, flag=flag)

    def ptr(self, type_id: int) -> int:
        return self.ref(Kind.PTR, type_id)

    def const(self, type_id: int) -> int:
        return self.ref(Kind.CONST, type_id)

    def typedef(self, name: str, type_id: int) -> int:
        return self.ref(Kind.TYPEDEF, type_id, name)

    def array(self, type_id: int, length: int, index_type: int = 1) -> int:
        return self.record(Kind.ARRAY, "", 0, type_id, index_type, length)

    def struct(self, name: str, size: int, members: Iterable[tuple[str, int, int]], kind: int = Kind.STRUCT) -> int:
        """Members are (name, type, position in bits)."""
        words = [word for member, type_id, at in members for word in (self.string(member), type_id, at)]
        return self.record(kind, name, size, *words, vlen=len(words) // 3)

    def bitfields(self, name: str, size: int, members: Iterable[tuple[str, int, int, int]]) -> int:
        """A structure with kind_flag. Members are (name, type, position in bits, width in bits or 0)."""
        words: list[int] = []
        for member, type_id, at, width in members:
            words += (self.string(member), type_id, width << 24 | at)
        return self.record(Kind.STRUCT, name, size, *words, vlen=len(words) // 3, flag=True)

    def enum(self, name: str, values: Mapping[str, int], size: int = 4, signed: bool = False) -> int:
        words = [word for text, value in values.items() for word in (self.string(text), value & 0xFFFFFFFF)]
        return self.record(Kind.ENUM, name, size, *words, vlen=len(values), flag=signed)

    def enum64(self, name: str, values: Mapping[str, int], signed: bool = False) -> int:
        words: list[int] = []
        for text, value in values.items():
            words += (self.string(text), value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)
        return self.record(Kind.ENUM64, name, 8, *words, vlen=len(values), flag=signed)

    def fwd(self, name: str, union: bool = False) -> int:
        return self.record(Kind.FWD, name, 0, flag=union)

    def prototype(self, returns: int, params: Iterable[tuple[str, int]], variadic: bool = False) -> int:
        listed = [*params, ("", 0)] if variadic else list(params)
        words = [word for name, type_id in listed for word in (self.string(name), type_id)]
        return self.record(Kind.FUNC_PROTO, "", returns, *words, vlen=len(listed))

    def func(self, name: str, prototype: int, linkage: int = 0) -> int:
        return self.record(Kind.FUNC, name, prototype, vlen=linkage)

    def var(self, name: str, type_id: int, linkage: int = 0) -> int:
        return self.record(Kind.VAR, name, type_id, linkage)

    def datasec(self, name: str, size: int, variables: Iterable[tuple[int, int, int]]) -> int:
        """Variables are (id of the VAR, offset, size)."""
        words = [word for variable in variables for word in variable]
        return self.record(Kind.DATASEC, name, size, *words, vlen=len(words) // 3)

    def decl_tag(self, name: str, type_id: int, component: int = -1) -> int:
        return self.record(Kind.DECL_TAG, name, type_id, component & 0xFFFFFFFF)


def kernel_like() -> BtfWriter:
    """A few types the way a kernel has them."""
    w = BtfWriter()
    i32, u64, char = w.integer("int", 4, SIGNED), w.integer("long unsigned int", 8), w.integer("char", 1, SIGNED)
    text = w.array(char, 16)
    thread = w.struct("thread_struct", 16, [("flags", u64, 0), ("sp", u64, 64)])
    pair = w.struct("", 8, [("pid", i32, 0), ("tgid", i32, 32)])
    union = w.struct("", 8, [("both", u64, 0), ("", pair, 0)], Kind.UNION)
    w.struct("task_struct", 48, [("", union, 64), ("thread", thread, 128), ("comm", text, 256)])
    w.typedef("pid_t", i32)
    return w
