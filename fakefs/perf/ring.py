"""The ring buffer of a perf event: what the guest's kernel has written there, for a copy that the host's program reads.

The copy has each byte where the guest has it, and is told of data by the same `data_head`. The guest is told what has
been read by the program's `data_tail`, so it is the guest's kernel that finds the buffer full, and says so in a record.

Follows struct perf_event_mmap_page and what is said about it in <linux/perf_event.h>.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from emulator.memory import PAGE, Memory

HEAD, TAIL = 1024, 1032
"""Offsets of data_head and data_tail in the first page."""
_VERSIONS = 8  # bytes at the beginning of it; behind them is how to read counters of a processor's
_AREA, _AREA_END = 1040, 1056  # data_offset and data_size


def is_length(length: int) -> bool:
    """Whether an event can be mapped with this length: a page, and 2^n behind it."""
    pages, rest = divmod(length, PAGE)
    return rest == 0 and pages >= 2 and (pages - 1) & (pages - 2) == 0


class Ring:
    """`frames` are the physical addresses of its pages in the guest's `memory`.

    `contents` is what the host has, data_head and data_tail included. A ring that `keeps` what was not read is full at
    times; another (mapped for reading only) is written round and round, from its end if `backward`.
    """

    def __init__(self, memory: Memory, frames: Sequence[int], *, keeps: bool, backward: bool = False) -> None:
        self._memory = memory
        self._frames = frames
        self._keeps = keeps
        self._backward = backward
        self._size = (len(frames) - 1) * PAGE
        self._head = 0
        self._tail = 0
        first = memory.read(frames[0], PAGE)
        self.contents = bytearray(len(frames) * PAGE)
        self.contents[:_VERSIONS] = first[:_VERSIONS]
        self.contents[_AREA:_AREA_END] = first[_AREA:_AREA_END]

    @property
    def unread(self) -> bool:
        """Whether there was something that the program had yet to read."""
        return self._keeps and self._tail != self._head

    def consume(self, tail: int) -> None:
        """The program has read as far as its `data_tail` says. What it cannot have read is ignored."""
        if self._keeps and (tail - self._tail) % (1 << 64) <= (self._head - self._tail) % (1 << 64):
            self._tail = tail
            struct.pack_into("<Q", self.contents, TAIL, tail)
            self._memory.write_u64(self._frames[0] + TAIL, tail)

    def advance(self) -> list[tuple[int, bytes]]:
        """Take over what the guest has written; return offsets and bytes that changed, data_head the last."""
        head = self._memory.read_u64(self._frames[0] + HEAD)
        first, last = (head, self._head) if self._backward else (self._head, head)
        count = (last - first) % (1 << 64)
        if count == 0:
            return []
        changed = []
        if count >= self._size:
            first, count = 0, self._size
        while count:
            at = first % self._size
            piece = min(count, PAGE - at % PAGE)
            data = self._memory.read(self._frames[1 + at // PAGE] + at % PAGE, piece)
            changed.append((PAGE + at, data))
            first, count = first + piece, count - piece
        self._head = head
        changed.append((HEAD, struct.pack("<Q", head)))
        for offset, data in changed:
            self.contents[offset : offset + len(data)] = data
        return changed
