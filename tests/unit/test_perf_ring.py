"""The copy of a perf event's ring: what a program reads is what a kernel has written, whenever the two are compared."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.memory import PAGE, Memory
from fakefs.perf.ring import HEAD, TAIL, Ring, is_length

_WORD = st.integers(0, (1 << 64) - 1)


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    memory = Memory(64 * PAGE)
    yield memory
    memory.close()


class Kernel:
    """Writes into a ring of pages that lie anywhere, as long as there is room."""

    def __init__(self, memory: Memory, frames: list[int]) -> None:
        self.memory, self.frames = memory, frames
        self.size = (len(frames) - 1) * PAGE
        self.written = bytearray()
        for frame in frames:
            memory.write(frame, bytes(PAGE))

    def write(self, data: bytes) -> None:
        tail = self.memory.read_u64(self.frames[0] + TAIL)
        if len(self.written) + len(data) - tail > self.size:
            return
        for byte in data:
            at = len(self.written) % self.size
            self.memory.write(self.frames[1 + at // PAGE] + at % PAGE, bytes([byte]))
            self.written.append(byte)
        self.memory.write_u64(self.frames[0] + HEAD, len(self.written))


class Program:
    """Has the pages that it is told of, and reads them."""

    def __init__(self, size: int) -> None:
        self.pages = bytearray(PAGE + size)
        self.size = size
        self.read = bytearray()

    def store(self, changed: list[tuple[int, bytes]]) -> None:
        for offset, data in changed:
            assert offset % PAGE + len(data) <= PAGE
            self.pages[offset : offset + len(data)] = data

    def take(self) -> int:
        [head] = struct.unpack_from("<Q", self.pages, HEAD)
        while len(self.read) < head:
            self.read.append(self.pages[PAGE + len(self.read) % self.size])
        return len(self.read)


_STEPS = st.lists(st.binary(max_size=3000) | st.sampled_from(("sync", "read")), max_size=60)


@given(st.sampled_from((1, 2, 4)), _STEPS)
def test_what_is_read_is_what_was_written(memory: Memory, pages: int, steps: list[bytes | str]) -> None:
    frames = [5 * PAGE, *(PAGE * (40 - 3 * number) for number in range(pages))]
    kernel, program = Kernel(memory, frames), Program(pages * PAGE)
    ring = Ring(memory, frames, keeps=True)
    tail = 0
    for step in [*steps, "sync", "read"]:
        if isinstance(step, bytes):
            kernel.write(step)
        elif step == "read":
            tail = program.take()
        else:
            if ring.unread:
                ring.consume(tail)
            program.store(ring.advance())
            assert ring.contents[PAGE:] == program.pages[PAGE:]
            assert ring.contents[TAIL : TAIL + 8] == memory.read(frames[0] + TAIL, 8)
    assert program.read == kernel.written
    assert ring.advance() == []


@given(_WORD, _WORD, st.booleans(), st.booleans())
def test_whatever_the_guest_says(memory: Memory, head: int, tail: int, keeps: bool, backward: bool) -> None:
    """Nothing is read or written but its pages, and a tail that cannot be is not believed."""
    frames = [0, PAGE, 2 * PAGE]
    Kernel(memory, frames)
    ring = Ring(memory, frames, keeps=keeps, backward=backward)
    memory.write_u64(HEAD, head)
    changed = ring.advance()
    assert all(offset >= PAGE and offset + len(data) <= 3 * PAGE for offset, data in changed[:-1])
    assert not changed or changed[-1] == (HEAD, struct.pack("<Q", head))
    assert sum(len(data) for _, data in changed[:-1]) <= 2 * PAGE
    ring.consume(tail)
    assert memory.read_u64(TAIL) == (tail if keeps and tail <= head else 0)


def test_a_ring_that_is_written_from_its_end(memory: Memory) -> None:
    frames = [0, PAGE, 2 * PAGE]
    Kernel(memory, frames)
    ring = Ring(memory, frames, keeps=False, backward=True)
    memory.write(2 * PAGE + PAGE - 8, b"abcdefgh")
    memory.write_u64(HEAD, (1 << 64) - 8)
    assert ring.advance() == [(3 * PAGE - 8, b"abcdefgh"), (HEAD, struct.pack("<q", -8))]
    assert not ring.unread


@given(st.integers(0, 1 << 33))
def test_lengths(length: int) -> None:
    pages = length / PAGE - 1
    assert is_length(length) == (pages >= 1 and pages == int(pages) and f"{int(pages):b}".count("1") == 1)
    assert is_length(2 * PAGE)
    assert is_length(129 * PAGE)
