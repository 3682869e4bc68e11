"""Trampolines and return stubs, executed: by functions of this test in this process, and by programs of its own."""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror import trampoline
from fakefs.mirror.trampoline import NotMovable, build, return_stub, window

_PAGE = 4096


class Code:
    """Two pages of code in this process: functions in the first, trampolines in the second."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2 * _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def write(self, offset: int, code: bytes) -> None:
        self.memory[offset : offset + len(code)] = code

    def call(self, *arguments: int) -> int:
        function = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * len(arguments))(self.at)
        return int(function(*arguments))

    def probe(self, offset: int = 0) -> None:
        """Put a trampoline under the instruction at an offset."""
        patch = build(7, self.at + offset, self.memory[offset : offset + 40], self.at + _PAGE)
        self.write(_PAGE, patch.trampoline)
        self.write(offset, patch.jump)


@pytest.fixture
def code() -> Code:
    return Code()


_RETURNS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "pushes": ("55 4889e5 488d0437 5d c3", lambda a, b: a + b),
    "five bytes": ("b805000000 4801f8 c3", lambda a, b: a + 5),
    "flags": ("4839f7 0f94c0 480fb6c0 c3", lambda a, b: int(a == b)),  # cmp, sete, movzx
    "carry": ("31c0 4801f7 4883d000 c3", lambda a, b: a + b >> 64),
    "RIP-relative": ("488b050a000000 4801f8 c3 909090909090 2a00000000000000", lambda a, b: a + 42),
    "a branch": ("4839f7 740a 4889f8 c3 909090909090 4c8d1c37 4c89d8 c3", lambda a, b: a + b if a == b else a),
    "red zone": ("48897c24f8 48897424a0 488b4424f8 48034424a0 c3", lambda a, b: a + b),
    "a call": ("e806000000 4801f0 c3 9090 488d4701 c3", lambda a, b: a + 1 + b),
    "a jump": ("e903000000 909090 488d0437 c3", lambda a, b: a + b),
    "a short jump": ("4889f8 eb01 90 4801f0 c3", lambda a, b: a + b),
    "ret at the end": ("4889f8 9090 c3", lambda a, b: a),
    "padding behind ret": ("89f8 c3 66662e0f1f840000000000", lambda a, b: a & 0xFFFFFFFF),
    "padding behind a jump": ("eb06 cccccccccccc 488d0437 c3", lambda a, b: a + b),
}


@pytest.mark.parametrize("text", _RETURNS)
def test_functions_return_the_same(code: Code, text: str) -> None:
    machine_code, expected = _RETURNS[text]
    code.write(0, bytes.fromhex(machine_code))
    values = [(0, 0), (3, 4), (5, 5), ((1 << 64) - 1, 1), ((1 << 64) - 1, (1 << 64) - 1)]
    before = [code.call(*each) for each in values]
    code.probe()
    assert [code.call(*each) for each in values] == before
    assert before == [expected(*each) & (1 << 64) - 1 for each in values]


def test_what_cannot_be_moved() -> None:
    for text in ("c3 4889f8 909090", "ff d0 909090", "eb01 4889f8 90", "e2fe 909090", "cd80 909090", "0f05 909090"):
        with pytest.raises(NotMovable):
            window(bytes.fromhex(text))
    with pytest.raises(NotMovable):
        window(b"\x06" * 8)  # no instruction
    with pytest.raises(NotMovable):
        window(b"\x90" * 4)
    with pytest.raises(NotMovable, match="far"):
        build(1, 1 << 40, b"\x90" * 5, 1 << 32)
    assert window(bytes.fromhex("31ed 4989d1 5e")) == 5
    assert window(bytes.fromhex("f30f1efa 31ed 4989d1")) == 6


@given(st.binary(max_size=48), st.integers(-(1 << 31), 1 << 31), st.integers(1, (1 << 32) - 1))
def test_any_bytes_are_moved_or_refused(data: bytes, distance: int, probe: int) -> None:
    site = 0x5555_0000_0000
    try:
        patch = build(probe, site, data, site + distance)
    except NotMovable:
        return
    assert 5 <= patch.replaced <= min(len(data), 19)  # at most four bytes and an instruction
    assert len(patch.trampoline) <= trampoline.ROOM
    assert patch.jump[:1] == b"\xe9"
    assert struct.unpack("<i", patch.jump[1:])[0] == distance - 5
    assert trampoline.is_one(patch.trampoline, probe)


# Instructions without effects on memory, of registers that a function may change: lengths from 1 to 10.
_HARMLESS = [
    *("90", "f8", "f9", "fc", "6690", "31c0", "01f8", "29f0", "21d1", "ffc0", "89fa", "48ffc1", "4801f0", "4829d7"),
    *("4d89c8", "4983c005", "480fafc7", "488d0437", "488d543e7f", "0f44c7", "480f42f2", "b8d2029649", "05ffffff7f"),
    *("48b8efcdab8967452301", "49ba0102030405060708", "9c 6689d2 9d", "50 59", "0f94c0", "d1e0", "48c1ca11", "e300"),
]


@given(st.lists(st.sampled_from(_HARMLESS[:-1]), min_size=5, max_size=12), st.randoms(use_true_random=False))
def test_what_is_moved_computes_the_same(pieces: list[str], rand: random.Random) -> None:
    """All registers and flags are folded into the result."""
    fold = "9c 59 81e1d5080000 4801c8 4801f8 4801f0 4801d0 4c01c0 4c01c8 4c01d0 4c01d8 c3".replace(" ", "")
    clear = "31c0 31c9 31d2 4531c0 4531c9 4531d2 4531db".replace(" ", "")
    body = bytes.fromhex(clear + "".join(pieces).replace(" ", "") + fold)
    code = Code()
    code.write(0, body)
    arguments = [(rand.getrandbits(64), rand.getrandbits(64)) for _ in range(4)]
    before = [code.call(*each) for each in arguments]
    try:
        code.probe(len(bytes.fromhex(clear)))
    except NotMovable:
        return
    assert [code.call(*each) for each in arguments] == before


# ---- returns


def _hijack(code: Code, entries: int, depth: int) -> bytes:
    """Code that calls a function which replaces its own return address as the recorder would; return the table."""
    stub = code.at + _PAGE
    code.write(_PAGE, return_stub(entries))
    table = stub + trampoline.STUB_TABLE + 16 * depth
    # mov $table,%rax; mov %rsp,(%rax); mov (%rsp),%rcx; mov %rcx,8(%rax); mov $stub,%rax; mov %rax,(%rsp);
    # lea 3(%rdi,%rsi),%rax; cmp %rdi,%rsi; ret
    function = b"\x48\xb8" + struct.pack("<Q", table) + bytes.fromhex("488920 488b0c24 48894808")
    function += b"\x48\xb8" + struct.pack("<Q", stub + trampoline.STUB_CODE) + bytes.fromhex("48890424")
    function += bytes.fromhex("488d443703 4839fe c3")
    # push %rbx; call function; sete %bl; movzx %bl,%ebx; shl $32,%rbx; add %rbx,%rax; pop %rbx; ret
    caller = bytes.fromhex("53 e80f000000 0f94c3 0fb6db 48c1e320 4801d8 5b c3")
    code.write(0, caller.ljust(0x15, b"\x90") + function)
    return return_stub(entries)


@pytest.mark.parametrize(("entries", "index"), [(1, 0), (16, 0), (16, 15), (64, 63)])
def test_a_function_returns_through_the_stub(code: Code, entries: int, index: int) -> None:
    stub = _hijack(code, entries, index)
    assert len(stub) == trampoline.STUB_TABLE + 16 * entries + len(trampoline.SIGNATURE)
    assert code.call(5, 6) == 14
    assert code.call(5, 5) == 13 + (1 << 32)  # flags are kept
    assert code.memory[_PAGE : _PAGE + 8] == trampoline.SIGNATURE
