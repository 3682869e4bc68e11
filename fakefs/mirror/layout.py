"""Puts what the addresses in the arguments of a call are of where the call of a shadow finds it.

Structures are small, and lie in one place; buffers in another, one behind the other. What is written begins with the
data that a record has; the rest is zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from fakefs.mirror.calls import Call
from fakefs.mirror.parts import IOVEC, MMSGHDR_SIZE, MSGHDR, POLLFD, chosen
from fakefs.mirror.records import Part, Transfer

COPIED_MAX = 1 << 20
"""Bytes that one call has the kernel move from one file to another."""
_SET_BITS = 1024


class Room(NamedTuple):
    """Addresses in the guest, and sizes in bytes. Of the buffers the first `settable` bytes can be given data."""

    structures: int
    structures_size: int
    buffers: int
    buffers_size: int
    settable: int


class Layout:
    """Of one call: its `words`, and what to put at the beginning of `structures` and `buffers` before it is made.

    `fds` are the guest's descriptors by those of the host. Raises ValueError when there is no room for all structures.
    """

    def __init__(self, call: Call, record: Transfer, fds: Mapping[int, int], room: Room) -> None:
        self._room = room
        self._fds = fds
        self._parts = iter(record.parts)
        self._files = iter(record.files)
        self._used = self._size = 0  # of all buffers; of what was before
        self._highest = -1  # descriptor in any fd_set
        self._unit = call.sizes[0] if "bc" in call.arguments else 0
        self.structures = bytearray()
        self.buffers = bytearray()
        self.words: list[int] = []
        for at, (letter, value) in enumerate(zip(call.arguments, record.arguments, strict=False)):
            several = call.arguments[at + 1 : at + 2] == "c"
            self.words.append(self._word(letter, value, record.arguments[at + 1] if several else None))
        if "e" in call.arguments:
            self.words[0] = self._highest + 1

    def _word(self, letter: str, value: int, count: int | None) -> int:
        if letter == "O":
            return self._fds[next(self._files).fd]
        if letter in "iw" or (letter == "c" and not self._unit):
            return value
        if letter == "c":
            return min(value, self._size // self._unit)
        if letter == "k":
            return min(value & (1 << 64) - 1, COPIED_MAX)
        if letter == "s":
            return self._size
        if not value or letter == "n":
            self._size = 0
            return 0
        if letter == "l":
            return self._structure(struct.pack("<I", self._size))
        if letter == "E":
            return self._structure(b"\0")
        if letter in "Mm":
            return self._messages(count, written=letter == "M")
        return self._place(letter, next(self._parts))

    def _place(self, letter: str, part: Part) -> int:
        data = part.data.encode("latin-1")
        if letter in "BbT":
            address, self._size = self._buffer(part.sizes[0], None if letter == "b" else data)
            return address
        if letter in "Vv":
            return self._structure(self._vector(part, written=letter == "V"))
        if letter == "p":
            polled = POLLFD.iter_unpack(data[: len(data) // POLLFD.size * POLLFD.size])
            return self._structure(b"".join(POLLFD.pack(self._fds.get(fd, -1), events) for fd, events in polled))
        if letter == "e":
            bits = {self._fds[fd] for fd in chosen(data) if self._fds.get(fd, _SET_BITS) < _SET_BITS}
            self._highest = max([self._highest, *bits])
            return self._structure(sum(1 << fd for fd in bits).to_bytes(_SET_BITS // 8, "little"))
        content = data.ljust(part.sizes[0], b"\0") if part.sizes else part.address.encode("latin-1")
        self._size = len(content)
        return self._structure(content)

    def _messages(self, count: int | None, *, written: bool) -> int:
        """One struct msghdr, or an array of `count` struct mmsghdr."""
        headers = b""
        for _ in range(1 if count is None else count):
            part = next(self._parts)
            address = part.address.encode("latin-1")
            name = self._structure(address) if address else 0
            vector = self._structure(self._vector(part, written=written))
            header = MSGHDR.pack(name, len(address), vector, len(part.sizes), 0, 0, 0)
            headers += header if count is None else header.ljust(MMSGHDR_SIZE, b"\0")
        return self._structure(headers)

    def _vector(self, part: Part, *, written: bool) -> bytes:
        vector, data = b"", part.data.encode("latin-1")
        for size in part.sizes:
            vector += IOVEC.pack(*self._buffer(size, data[:size] if written else None))
            data = data[size:]
        return vector

    def _buffer(self, size: int, data: bytes | None) -> tuple[int, int]:
        """Take a buffer, to be written from if it has data; return its address and its size: less if room is scarce."""
        start = self._used
        size = min(size, self._room.buffers_size - start)
        self._used += size
        settable = min(self._used, self._room.settable)
        if data is not None and start < settable:
            self.buffers += bytes(start - len(self.buffers)) + data[: settable - start]
            self.buffers += bytes(settable - len(self.buffers))
        return self._room.buffers + start, size

    def _structure(self, content: bytes) -> int:
        address = self._room.structures + len(self.structures)
        self.structures += content.ljust(-len(content) % 8 + len(content), b"\0")
        if len(self.structures) > self._room.structures_size:
            raise ValueError("too many structures")
        return address


def buffers_size(record: Transfer) -> int:
    """Return the size of all buffers of a call, in bytes."""
    return sum(size for part in record.parts for size in part.sizes)
