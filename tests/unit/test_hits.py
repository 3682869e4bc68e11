"""What a shadow is given for a hit: pages of memory, and registers by a signal frame."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import struct

from hypothesis import given
from hypothesis import strategies as st

from emulator.agent import WINDOW_VIRTUAL, Task
from fakefs.mirror.hits import frame, pages_of, runs
from fakefs.mirror.trampoline import SAVED

_PAGE = 4096
_STACK = 0x7FFE_0000_1800


def contents(pieces: list[tuple[int, bytes]], stack: int = _STACK, taken: range = range(0)) -> dict[int, bytes]:
    return {start + page.first: page.contents for start, page in pages_of(pieces, stack, taken).items()}


def test_pages() -> None:
    assert list(pages_of([], _STACK, range(0))) == [_STACK & -_PAGE]
    assert sorted(pages_of([], _STACK & -_PAGE, range(0))) == [(_STACK & -_PAGE) - _PAGE, _STACK & -_PAGE]
    found = contents([(_STACK, b"stack"), (0x10FFE, b"abcd"), (0x11100, b"e"), (0x11001, b"X")])
    assert found == {_STACK: b"stack", 0x10FFE: b"ab", 0x11000: b"cX" + bytes(0xFE) + b"e"}


def test_what_is_not_mapped() -> None:
    """Not the lowest addresses, nor the kernel's, nor what is there already."""
    pieces = [(0, b"a"), (0xFFF0, b"b"), ((1 << 64) - 1, b"c"), (0x7FFF_FFFF_F000, b"d"), (WINDOW_VIRTUAL + 5, b"e")]
    assert contents([*pieces, (0x40_0000, b"f")], taken=range(0x40_0000, 0x40_1000)) == {(_STACK & -_PAGE) + _PAGE: b""}
    many = pages_of([(0x10_0000 * index, b"x") for index in range(1, 100)], _STACK, range(0))
    assert len(many) == 9


@given(st.lists(st.tuples(st.integers(-10, 1 << 64), st.binary(max_size=9000)), max_size=8), st.integers(0, 1 << 64))
def test_any_pieces(pieces: list[tuple[int, bytes]], stack: int) -> None:
    pages = pages_of(pieces, stack, range(0x10000, 0x20000))
    assert len(pages) <= 9
    assert all(0x20000 <= start < 1 << 47 and start % _PAGE == 0 for start in pages)
    assert [start for run in runs(pages) for start in run[::_PAGE]] == sorted(pages)


# ---- the frame


def test_a_frame_is_what_the_kernel_takes() -> None:
    """A process of this machine goes on as a frame says: with these registers, for one instruction."""
    code = mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    code[:] = b"\x0f\x0b" * (_PAGE // 2)  # ud2
    code[0x100:0x103] = b"\x48\x01\xf7"  # add %rsi,%rdi; then it traps
    registers = {name: 0x1111 * number for number, name in enumerate(SAVED)}
    registers |= {"sp": at + 0xF00, "ip": at + 0x100, "di": 40, "si": 2, "flags": 0x2}
    context = bytearray(frame(registers, Task(3), trap=True))
    struct.pack_into("<QixxxxQ", context, 16, 0, 2, 0)  # no alternate stack here
    code[0x400 : 0x400 + len(context)] = bytes(context)
    # mov $frame,%rsp; mov $15,%eax; syscall
    code[:16] = b"\x48\xbc" + struct.pack("<Q", at + 0x400) + b"\xb8\x0f\x00\x00\x00\x0f"
    code[16:17] = b"\x05"
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.CFUNCTYPE(None)(at)()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTRAP
