"""What memory the arguments of uprobes look at."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.fetchargs import Memory, look

_BASE, _HEAP, _STACK = 0x5000, 0x8000, 0x7000
_REGISTERS = {"di": _HEAP, "si": 5, "dx": _HEAP + 0x20, "ax": _HEAP + 0x100, "sp": _STACK}


class Process:
    """Three pages of memory."""

    def __init__(self) -> None:
        self.memory = bytearray(0x4000)
        self.put(_HEAP, b"hello\0")
        self.put(_HEAP + 0x20, struct.pack("<3Q", _HEAP + 0x40, _HEAP + 0x60, 1))
        self.put(_HEAP + 0x40, b"first\0")
        self.put(_HEAP + 0x60, struct.pack("<Q", _HEAP + 0x80))
        self.put(_HEAP + 0x80, b"x" * 100 + b"\0")
        self.put(_HEAP + 0x100, b"result\0")
        self.put(_STACK + 8, struct.pack("<Q", _HEAP))

    def put(self, address: int, data: bytes) -> None:
        self.memory[address - _BASE : address - _BASE + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        at = address - _BASE
        return bytes(self.memory[at : at + size]) if 0 <= at < len(self.memory) and size > 0 else b""


@pytest.mark.parametrize(
    ("argument", "seen"),
    [
        ("a=%di", {}),
        ("a=%si:s32", {}),
        ("a=\\42", {}),
        ("a=$comm", {}),
        ("a=$retval:x64", {}),
        ("a=+0(%di):string", {_HEAP: b"hello"}),
        ("a=%di:string", {_HEAP: b"hello"}),
        ("a=+0($retval):string", {_HEAP + 0x100: b"result"}),
        ("a=+8(%dx)", {_HEAP + 0x28: struct.pack("<Q", _HEAP + 0x60)}),
        ("a=-0x20(%dx):ustring", {_HEAP: b"hello"}),
        ("a=+u0(+0(+u8(%dx))):string", {_HEAP + 0x28: b"", _HEAP + 0x60: b"", _HEAP + 0x80: b"x" * 64}),
        ("a=+0(%dx):string[2]", {_HEAP + 0x20: b"", _HEAP + 0x40: b"first", _HEAP + 0x60: b""}),
        ("a=+0(%dx):u64[3]", {_HEAP + 0x20: struct.pack("<3Q", _HEAP + 0x40, _HEAP + 0x60, 1)}),
        ("a=+0(%dx):b4@4/32", {_HEAP + 0x20: b""}),
        ("a=$stack1", {_STACK + 8: struct.pack("<Q", _HEAP)}),
        ("a=+0($stack1):string", {_STACK + 8: b"", _HEAP: b"hello"}),
        ("a=+8($stack)", {_STACK + 8: struct.pack("<Q", _HEAP)}),
        (f"a=@{_HEAP:#x}:string", {_HEAP: b"hello"}),
        (f"a=@+{_HEAP - _BASE}:string", {_HEAP: b"hello"}),
        ("a=+0(%nothing)", {}),
        ("a=+0(", {}),
        ("no argument", {}),
        ("a=@08", {}),
    ],
)
def test_what_is_looked_at(argument: str, seen: dict[int, bytes]) -> None:
    memory = Memory(Process().read, 1 << 14)
    look([argument], _REGISTERS, _BASE, memory)
    assert {address: memory.pieces[address][: len(data)] for address, data in seen.items()} == seen
    assert set(memory.pieces) <= set(seen) | {_HEAP + 0x80 + 64, _HEAP + 0x60}


def test_no_more_than_what_is_wanted() -> None:
    process = Process()
    process.put(_HEAP, b"y" * 0x1000)
    memory = Memory(process.read, 1000)
    look(["a=+0(%di):string", "b=+0(%dx):u64[64]"], _REGISTERS, _BASE, memory)
    assert sum(map(len, memory.pieces.values())) == 1000
    memory = Memory(process.read, 1 << 20)
    look(["a=+0(%di):string"], _REGISTERS, _BASE, memory)
    assert sum(map(len, memory.pieces.values())) == 4096


_FETCH = st.recursive(
    st.sampled_from(["%di", "%dx", "$retval", "$stack", "$stack9999", "@+16", f"@{(1 << 64) - 1:#x}", "$comm", "\\1"]),
    lambda inner: st.builds("{}{}({})".format, st.sampled_from("+-"), st.integers(0), inner),
)


@given(st.builds("{}={}:{}".format, st.just("a"), _FETCH, st.sampled_from(["x64", "string", "u8[999]"])) | st.text())
def test_any_argument_is_read(argument: str) -> None:
    memory = Memory(Process().read, 1 << 13)
    look([argument], _REGISTERS, _BASE, memory)
    assert sum(map(len, memory.pieces.values())) <= 1 << 13
