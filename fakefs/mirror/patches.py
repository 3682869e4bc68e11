"""Writing trampolines and return stubs into a process of the host, through /proc/PID/mem: proc_pid_mem(5).

What is written goes into the process's own copies of pages, never into a file. There is room in the zeros with which a
linker fills the last page of a code segment. What is there already is recognised by looking, so nothing is remembered
of processes, and those that have been forked need no care.

It is done while the process waits in a system call and only where nothing can be in the middle of what is replaced.
Where that is not sure, or there is no room, nothing is done and the probe does not hit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from fakefs.mirror import trampoline
from fakefs.mirror.elftext import ElfText, Segment
from fakefs.mirror.records import Contents, Returns, Site
from fakefs.mirror.trampoline import CODE_MAX, ENTRY, JUMP_SIZE, ROOM, SIGNATURE, STUB_CODE, STUB_TABLE, NotMovable

_PAGE = 4096
_FILE_MAX = 1 << 28
_FILES_KEPT, _SITES_KEPT = 256, 1 << 16
_MAPS_MAX = 1 << 20
_STACK_MAX = 1 << 20
_ENTRIES = (64, 16)  # of a table of return addresses: as deep as the kernel goes, or what there is room for
_FAR = (1 << 31) - (1 << 24)
_RED_ZONE = 128


class Mapped(NamedTuple):
    """A private mapping of code. `end` and `start` are addresses, `offset` is in the file."""

    start: int
    end: int
    offset: int
    file: Contents
    path: str


class Code:
    """What is known of the files that processes have mapped: who they are, and which instructions can be replaced.

    `never` is the device of our own mount, where this process may not look.
    """

    def __init__(self, never: int) -> None:
        self._never = never
        self._segments: dict[Contents, list[Segment]] = {}
        self._replaceable: dict[tuple[Contents, int], int] = {}

    def mapped(self, tid: int) -> list[Mapped]:
        """Return the mappings of a process that have code of a file. Raises OSError."""
        with open(f"/proc/{tid}/maps", "rb") as file:
            lines = file.read(_MAPS_MAX).split(b"\n")
        found = []
        for line in lines:
            words = line.split(None, 5)
            if len(words) < 6 or words[1][2:4] != b"xp" or not words[5].startswith(b"/"):
                continue
            start, end = (int(word, 16) for word in words[0].split(b"-"))
            path = os.fsdecode(words[5])
            file_mapped = self._file(tid, words[3].decode(), path)
            if file_mapped is not None:
                found.append(Mapped(start, end, int(words[2], 16), file_mapped, path))
        return found

    def _file(self, tid: int, device: str, path: str) -> Contents | None:
        """Return which file is mapped: its numbers in /proc/PID/maps need not be those that stat(2) gives."""
        major, minor = (int(each, 16) for each in device.split(":"))
        if os.makedev(major, minor) == self._never:
            return None
        try:
            found = os.stat(f"/proc/{tid}/root{path}")
        except OSError:
            return None
        return None if found.st_dev == self._never else _contents(found)

    def segments(self, tid: int, mapped: Mapped) -> list[Segment]:
        """Return the code segments of a mapped file; none when it is odd."""
        if mapped.file not in self._segments:
            if len(self._segments) >= _FILES_KEPT:
                self._segments.clear()
            self._segments[mapped.file] = []
            with suppress(OSError, ValueError):
                self._segments[mapped.file] = ElfText(_read(tid, mapped, _PAGE)).segments
        return self._segments[mapped.file]

    def replaceable(self, tid: int, mapped: Mapped, offset: int) -> int:
        """Return how many bytes a jump would replace; 0 when it may not be written."""
        key = (mapped.file, offset)
        if key not in self._replaceable:
            if len(self._replaceable) >= _SITES_KEPT:
                self._replaceable.clear()
            self._replaceable[key] = 0
            with suppress(OSError, ValueError, NotMovable):
                self._replaceable[key] = ElfText(_read(tid, mapped, _FILE_MAX)).replaceable(offset)
        return self._replaceable[key]


def _contents(status: os.stat_result) -> Contents:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(tid: int, mapped: Mapped, size: int) -> bytes:
    """Return a mapped file, or `size` bytes of it."""
    fd = os.open(f"/proc/{tid}/root{mapped.path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if _contents(status) != mapped.file or status.st_size > _FILE_MAX:
            raise ValueError("not the file that is mapped")
        return file.read(size)


class Process:
    """The memory of a process whose thread `tid` waits in a system call, as `waits()` confirms. Raises OSError."""

    def __init__(self, tid: int, code: Code, waits: Callable[[], bool]) -> None:
        self._tid = tid
        self._code = code
        self._mapped: list[Mapped] | None = None
        self._memory = os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        if not waits():
            os.close(self._memory)
            raise ProcessLookupError

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)

    def read(self, address: int, size: int) -> bytes:
        """Return what there is of so many bytes at an address."""
        try:
            return os.pread(self._memory, size, address)
        except (OSError, OverflowError):
            return b""

    def write(self, address: int, data: bytes) -> None:
        """Write, read-only memory too. Raises OSError."""
        if os.pwrite(self._memory, data, address) != len(data):
            raise OSError("the process has ended")

    @property
    def mapped(self) -> list[Mapped]:
        """Its code, as it was when first asked. Raises OSError."""
        if self._mapped is None:
            self._mapped = self._code.mapped(self._tid)
        return self._mapped

    # ---- entries

    def place(self, sites: Mapping[Contents, Iterable[Site]]) -> None:
        """Have all instructions that `sites` says tell. Raises OSError, for one, when there are other threads."""
        stack: bytes | None = None
        for mapped in self.mapped:
            for site in sites.get(mapped.file, ()):
                address = mapped.start + site.offset - mapped.offset
                if not mapped.start <= address < mapped.end - JUMP_SIZE:
                    continue
                size = self._code.replaceable(self._tid, mapped, site.offset)
                if not size:
                    continue
                if stack is None:
                    stack = self._stack()
                if _leads_into(stack, address, size):
                    continue
                with suppress(NotMovable, OSError):
                    self._patch(mapped, site, address, size)

    def _patch(self, mapped: Mapped, site: Site, address: int, size: int) -> None:
        code = self.read(address, CODE_MAX)
        if self._is_patched(code, site, address):
            return
        room = self._room(mapped, address)
        patch = trampoline.build(site.id, address, code, room)
        if patch.replaced == size:
            self.write(room, patch.trampoline)
            self.write(address, patch.jump)

    def _is_patched(self, code: bytes, site: Site, address: int) -> bool:
        if code[:1] != b"\xe9":
            return False
        target = address + JUMP_SIZE + struct.unpack_from("<i", code, 1)[0]
        return trampoline.is_one(self.read(target, ROOM), site.id)

    def _stack(self) -> bytes:
        """Return what is on the stack of the one thread; raises OSError when there are several, or it is too deep."""
        if len(os.listdir(f"/proc/{self._tid}/task")) != 1:
            raise OSError("several threads")
        with open(f"/proc/{self._tid}/syscall", "rb") as file:
            words = file.read(256).split()
        if len(words) < 3:
            raise OSError("it waits no more")
        pointer = int(words[-2], 16)
        data = b""
        for start, end in self._writable():
            if start <= pointer < end and end - pointer < _STACK_MAX:
                data = self.read(pointer - _RED_ZONE, end - pointer + _RED_ZONE)
        if not data:
            raise OSError("an unknown stack")
        return data

    def _writable(self) -> Iterator[tuple[int, int]]:
        with open(f"/proc/{self._tid}/maps", "rb") as file:
            for line in file.read(_MAPS_MAX).split(b"\n"):
                words = line.split(None, 2)
                if len(words) > 1 and words[1][:2] == b"rw":
                    start, end = words[0].split(b"-")
                    yield int(start, 16), int(end, 16)

    # ---- room

    def _room(self, near: Mapped, address: int) -> int:
        """Return where a trampoline can be. Raises NotMovable when there is no room, OSError."""
        for mapped in (near, *(each for each in self.mapped if each is not near)):
            start, end = self._free(mapped)
            if end - start >= ROOM and abs(start - address) < _FAR:
                return start
        raise NotMovable("no room")

    def _free(self, mapped: Mapped) -> tuple[int, int]:
        """Return the addresses between which a mapping has nothing, behind its code."""
        for segment in self._code.segments(self._tid, mapped):
            start = mapped.start + segment.offset + segment.size - mapped.offset
            if mapped.start < start < mapped.end < start + _PAGE:
                data = self.read(start, mapped.end - start)
                return start + len(data.rstrip(b"\0")) + 15 & ~15, mapped.end
        return 0, 0

    # ---- returns

    def stub(self) -> tuple[int, int] | None:
        """Return address and number of entries of the return stub, which is written if it is not there yet."""
        widest = (0, 0)
        for mapped in self.mapped:
            for segment in self._code.segments(self._tid, mapped):
                start = mapped.start + segment.offset + segment.size - mapped.offset
                if not mapped.start < start < mapped.end < start + _PAGE:
                    continue
                data = self.read(start, mapped.end - start)
                at = data.find(SIGNATURE)
                if at >= 0 and at + 16 <= len(data):
                    return start + at, min(int.from_bytes(data[at + 8 : at + 16], "little"), _ENTRIES[0])
                free, end = self._free(mapped)
                if end - free > widest[1] - widest[0]:
                    widest = free, end
        for entries in _ENTRIES:
            stub = trampoline.return_stub(entries)
            if widest[1] - widest[0] >= len(stub):
                self.write(widest[0], stub)
                return widest[0], entries
        return None

    def plant(self, slot: int) -> Returns:
        """Have the function whose return address is at `slot` of the stack return to the stub. Raises OSError."""
        stub = self.stub()
        if stub is None:
            return Returns.NOT
        at, entries = stub
        address = self.read(slot, 8)
        if address == struct.pack("<Q", at + STUB_CODE):
            return Returns.TOLD_ALREADY
        if len(address) < 8:
            return Returns.NOT
        table = self.read(at + STUB_TABLE, entries * ENTRY.size)
        keys = [key for key, _ in ENTRY.iter_unpack(table[: len(table) // ENTRY.size * ENTRY.size])]
        index = keys.index(slot) if slot in keys else keys.index(0) if 0 in keys else None
        if index is None:
            return Returns.NOT
        entry = at + STUB_TABLE + index * ENTRY.size
        self.write(entry + 8, address)
        self.write(entry, struct.pack("<Q", slot))
        self.write(slot, struct.pack("<Q", at + STUB_CODE))
        return Returns.TOLD

    def lift(self, slot: int) -> None:
        """A function has returned through the stub, which has put its address back: free the entry."""
        stub = self.stub()
        if stub is None:
            return
        at, entries = stub
        table = self.read(at + STUB_TABLE, entries * ENTRY.size)
        for index, (key, _) in enumerate(ENTRY.iter_unpack(table[: len(table) // ENTRY.size * ENTRY.size])):
            if key == slot:
                self.write(at + STUB_TABLE + index * ENTRY.size, bytes(8))


def _leads_into(stack: bytes, address: int, size: int) -> bool:
    """Is the address of the middle of what would be replaced on a stack, so that it may be returned to?"""
    return any(struct.pack("<Q", inside) in stack for inside in range(address + 1, address + size))
