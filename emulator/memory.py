"""The guest's memory as the host sees it: RAM in one mapping, a shared window above it, and the walk of page tables.

Physical layout: RAM from 0; behind it, outside the e820 map, the window that agent and host exchange calls through.
Everything the guest names (addresses, lengths) is checked here before the host touches memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from pathlib import Path

from emulator.errors import EmulatorError

PAGE = 4096
_MAP_NORESERVE = 0x4000  # mman.h; the mmap module of Python 3.11 has no name for it
_PRESENT = 1
_LARGE = 1 << 7
_FRAME = 0x000F_FFFF_FFFF_F000


class BadAddress(EmulatorError):
    """An address outside RAM, or a guest virtual address that is not mapped."""


class Memory:
    """`size` bytes of physical memory from address 0, in this process at `host_address`.

    With `backing`, its content comes from that file, mapped privately: pages are shared until written. The file has a
    shared lock (flock(2)) for as long as any process has it mapped.
    """

    def __init__(self, size: int, backing: Path | None = None) -> None:
        self.size = size
        if backing is None:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        else:
            fd = os.open(backing, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)  # of the open file, which the mapping keeps
                self._map = mmap.mmap(
                    fd, size, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            finally:
                os.close(fd)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.host_address = ctypes.addressof(self._anchor)
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmap; nothing may use the memory any more."""
        self.view.release()
        del self._anchor
        self._map.close()

    # ---- physical

    def _check(self, physical: int, size: int) -> None:
        if physical < 0 or size < 0 or physical + size > self.size:
            raise BadAddress(f"physical {physical:#x}+{size:#x} is outside the guest's {self.size >> 20} MiB")

    def read(self, physical: int, size: int) -> bytes:
        """Return bytes at a physical address. Raises BadAddress."""
        self._check(physical, size)
        return bytes(self.view[physical : physical + size])

    def write(self, physical: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at a physical address. Raises BadAddress."""
        self._check(physical, len(data))
        self.view[physical : physical + len(data)] = data

    def read_u64(self, physical: int) -> int:
        """Return a little-endian 64-bit word at a physical address. Raises BadAddress."""
        self._check(physical, 8)
        return int(struct.unpack_from("<Q", self.view, physical)[0])

    def write_u64(self, physical: int, value: int) -> None:
        """Write a little-endian 64-bit word at a physical address. Raises BadAddress."""
        self._check(physical, 8)
        struct.pack_into("<Q", self.view, physical, value)

    def read_u32(self, physical: int) -> int:
        """Return a little-endian 32-bit word at a physical address. Raises BadAddress."""
        self._check(physical, 4)
        return int(struct.unpack_from("<I", self.view, physical)[0])

    def write_u32(self, physical: int, value: int) -> None:
        """Write a little-endian 32-bit word at a physical address. Raises BadAddress."""
        self._check(physical, 4)
        struct.pack_into("<I", self.view, physical, value)

    # ---- guest virtual

    def translate(self, virtual: int, cr3: int) -> int:
        """Return the physical address of a guest virtual one under 4-level paging (Intel SDM vol. 3, 4.5).

        Raises BadAddress when it is not mapped.
        """
        table = cr3 & _FRAME
        for shift in (39, 30, 21, 12):
            entry = self.read_u64(table + (virtual >> shift & 511) * 8)
            if not entry & _PRESENT:
                raise BadAddress(f"guest address {virtual:#x} is not mapped")
            if shift in (30, 21) and entry & _LARGE:
                size = 1 << shift
                return (entry & _FRAME & ~(size - 1)) | virtual & (size - 1)
            table = entry & _FRAME
        return table | virtual & (PAGE - 1)

    def read_virtual(self, virtual: int, size: int, cr3: int) -> bytes:
        """Return bytes at a guest virtual address, page by page. Raises BadAddress."""
        parts = []
        while size > 0:
            piece = min(size, PAGE - virtual % PAGE)
            parts.append(self.read(self.translate(virtual, cr3), piece))
            virtual, size = virtual + piece, size - piece
        return b"".join(parts)

    # ---- files

    def save(self, path: Path, size: int | None = None) -> None:
        """Write the first `size` bytes (all of it by default) to a sparse file, durably; zero pages are left out."""
        end = self.size if size is None else size
        zero = bytes(PAGE)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, end)
            start = 0
            while start < end:
                if self.view[start : start + PAGE] == zero:
                    start += PAGE
                    continue
                stop = start + PAGE
                while stop < end and stop - start < 1 << 20 and self.view[stop : stop + PAGE] != zero:
                    stop += PAGE
                written = start
                while written < stop:
                    written += os.pwrite(fd, self.view[written:stop], written)
                start = stop
            os.fsync(fd)
        finally:
            os.close(fd)
