"""What the addresses in the arguments of a call on open files are of, read from the memory of its thread.

A thread can change its memory while it is read: all of it has bounds, and what it refers to is read once. Structures
are those of readv(2), sendmsg(2), sendmmsg(2), poll(2), select(2) and epoll_wait(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from fakefs.mirror.calls import Call
from fakefs.mirror.endpoints import ADDRESS_MAX, address_in_guest
from fakefs.mirror.hostpaths import HostPaths, NotMirrored
from fakefs.mirror.records import Entry, Part
from fakefs.mirror.seccomp import Notification, read_memory, read_string

DATA_MAX = 4096
"""Bytes of what one call writes that are written in the guest too; the rest is zeros there."""
VECTOR_MAX = 32
"""Buffers of a vector: the last one is as large as all that are left."""
MESSAGES_MAX = 4
POLLED_MAX = 16
"""Files that one call waits for; others are left out."""
POLLFD = struct.Struct("<iI")  # a descriptor, and events
IOVEC = struct.Struct("<QQ")
MSGHDR = struct.Struct("<QI4xQQQQI4x")
MMSGHDR_SIZE = MSGHDR.size + 8
_NUMBERS = "isckwO"
_SIZE_MAX = 0x7FFFF000  # bytes that the kernel moves at a time
_VECTOR_READ_MAX = 256
_SET_MAX = 128
_OPTION_MAX = 256
_TIME_SIZE = 16
_TEXT_MAX = 256


class Parts:
    """Of one call: `arguments` and `parts` as in a record, and the directories that addresses of sockets `need`."""

    def __init__(self, notification: Notification, call: Call, paths: HostPaths) -> None:
        self._tid = notification.tid
        self._values = notification.arguments
        self._letters = call.arguments
        self._paths = paths
        self._sizes = iter(call.sizes)
        self.needed: list[Entry] = []
        self.parts: list[Part] = []
        self.arguments: list[int] = []
        for letter, value in zip(self._letters, self._values, strict=False):
            if letter in _NUMBERS:
                self.arguments.append(value - (value >> 63 << 64))
            else:
                self.arguments.append(int(value > 0 and letter != "n"))
        for at, letter in enumerate(self._letters):
            self._read(at, letter, self._values[at])

    def descriptors(self) -> Iterator[int]:
        """Yield the descriptors that poll(2) or select(2) is given, each once."""
        found: dict[int, None] = {}
        pointed = [
            letter for letter, there in zip(self._letters, self.arguments, strict=True) if letter in "pe" and there
        ]
        for letter, part in zip(pointed, self.parts, strict=False):
            found.update((fd, None) for fd in (polled if letter == "p" else chosen)(part.data.encode("latin-1")))
        yield from list(found)[:POLLED_MAX]

    def _read(self, at: int, letter: str, value: int) -> None:
        if letter in "Bb":
            size = self._size(at)
            if value:
                self.parts.append(self._buffers([(value, size)], written=letter == "B"))
        elif not value:
            return
        elif letter in "Vv":
            buffers = self._vector(value, self._values[at + 1])
            self.arguments[at + 1] = len(buffers)
            self.parts.append(self._buffers(buffers, written=letter == "V"))
        elif letter in "Mm":
            several = self._letters[at + 1] == "c"
            count = min(self._values[at + 1], MESSAGES_MAX) if several else 1
            if several:
                self.arguments[at + 1] = count
            self.parts += [self._message(value + MMSGHDR_SIZE * each, written=letter == "M") for each in range(count)]
        elif letter == "S":
            size = self._values[at + 1] & 0xFFFFFFFF
            self.parts.append(Part([], "", self._address(value, size)))
        elif letter == "a":
            self.parts.append(Part([min(self._int(self._values[at + 1]), ADDRESS_MAX)]))
        elif letter == "p":
            count = self.arguments[at + 1] = min(self._values[at + 1], _SIZE_MAX, POLLED_MAX * 4)
            self.parts.append(Part([], read_memory(self._tid, value, POLLFD.size * count).decode("latin-1")))
        elif letter == "e":
            size = min((self._values[0] & 0x7FFFFFFF) + 63 >> 6 << 3, _SET_MAX)
            self.parts.append(Part([], read_memory(self._tid, value, size).decode("latin-1")))
        elif letter in "tu":
            self.parts.append(Part([_TIME_SIZE], read_memory(self._tid, value, _TIME_SIZE).decode("latin-1")))
        elif letter == "T":
            text = read_string(self._tid, value, _TEXT_MAX)
            if text is None:
                raise NotMirrored
            self.parts.append(Part([len(text) + 1], text.decode("latin-1")))

    def _size(self, at: int) -> int:
        """Return the size of a buffer, by the next argument or the table."""
        following = self._letters[at + 1 : at + 2]
        if following == "s":
            return min(self._values[at + 1], _SIZE_MAX)
        if following == "l":
            return min(self._int(self._values[at + 1]), _OPTION_MAX)
        size = next(self._sizes)
        return min(size * (self._values[at + 1] & 0x7FFFFFFF), _SIZE_MAX) if following == "c" else size

    def _vector(self, address: int, count: int) -> list[tuple[int, int]]:
        data = read_memory(self._tid, address, IOVEC.size * min(count, _VECTOR_READ_MAX))
        buffers = list(IOVEC.iter_unpack(data[: len(data) // IOVEC.size * IOVEC.size]))
        rest = buffers[VECTOR_MAX - 1 :]
        if len(rest) > 1:
            buffers[VECTOR_MAX - 1 :] = [(rest[0][0], sum(size for _, size in rest))]
        return buffers

    def _buffers(self, buffers: list[tuple[int, int]], *, written: bool, address: str = "") -> Part:
        sizes = [min(size, _SIZE_MAX) for _, size in buffers]
        data = b""
        for (at, _), size in zip(buffers if written else [], sizes, strict=False):
            wanted = min(size, DATA_MAX - len(data))
            data += read_memory(self._tid, at, wanted).ljust(wanted, b"\0") if wanted else b""
        return Part(sizes, data.rstrip(b"\0").decode("latin-1"), address)

    def _message(self, address: int, *, written: bool) -> Part:
        name, name_size, vector, count, *_ = MSGHDR.unpack(read_memory(self._tid, address, MSGHDR.size))
        if not name or not name_size:
            text = ""
        elif written:
            text = self._address(name, name_size)
        else:
            text = "\0" * min(name_size, ADDRESS_MAX)
        return self._buffers(self._vector(vector, count), written=written, address=text)

    def _address(self, address: int, size: int) -> str:
        data = read_memory(self._tid, address, min(size, ADDRESS_MAX))
        data, directory = address_in_guest(data, os.readlink(f"/proc/{self._tid}/cwd"), self._paths)
        self.needed += [] if directory is None else directory.entries
        return data.decode("latin-1")

    def _int(self, address: int) -> int:
        return int.from_bytes(read_memory(self._tid, address, 4), "little") & 0x7FFFFFFF


def polled(data: bytes) -> Iterator[int]:
    """Yield the descriptors in an array of struct pollfd."""
    for fd, _ in POLLFD.iter_unpack(data[: len(data) // POLLFD.size * POLLFD.size]):
        if fd >= 0:
            yield fd


def chosen(data: bytes) -> Iterator[int]:
    """Yield the descriptors in an fd_set."""
    bits = int.from_bytes(data, "little")
    while bits:
        fd = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        yield fd
