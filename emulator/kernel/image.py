"""A Linux kernel's image: unpack a vmlinuz, read the ELF inside, address its bytes by kernel virtual address.

Takes what distributions ship (`vmlinuz`, a bzImage) and what a kernel build leaves (`vmlinux`). Reads only: nothing is
relocated or loaded here, and the kernel's own decompressor is never run. Symbols are `emulator.kernel.kallsyms`.

Follows Linux's Documentation/arch/x86/boot.rst (the setup header) and the ELF-64 object file format.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from emulator.errors import EmulatorError

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""Virtual address of physical address 0 in the kernel's own mapping (Linux: Documentation/arch/x86/x86_64/mm.rst)."""

OLDEST = (5, 15)
LARGEST = 512 << 20
"""Bytes: no kernel unpacks to more (the kernel's mapping of its own image ends at 512 MiB without KASLR)."""


class NotAKernel(EmulatorError):
    """The file is not a kernel this emulator can run; the message says why."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One loadable part: `data` goes to physical address `paddr`, zeros follow up to `memsz` bytes."""

    paddr: int
    data: memoryview
    memsz: int


@dataclass
class KernelImage:
    """An x86-64 vmlinux, unpacked.

    `entry` is the physical address of startup_64, `version` the release string of the banner
    ("6.12.107+deb13-cloud-amd64"), `release` its first two numbers, `sha256` the hex digest of the file at `path`.
    """

    path: Path
    sha256: str
    entry: int
    segments: list[Segment]
    version: str
    release: tuple[int, int]
    elf: bytes = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> KernelImage:
        """Read the kernel at `path`; raises NotAKernel."""
        packed = _read_file(path)
        elf = _unpack(packed, path)
        entry, segments = _parse_elf(elf, path)
        version, release = _banner(segments, path)
        return cls(path, hashlib.sha256(packed).hexdigest(), entry, segments, version, release, elf)

    def read(self, vaddr: int, size: int) -> bytes:
        """Return `size` bytes at kernel virtual address `vaddr`, as they are before the kernel runs.

        Raises IndexError when they are not all inside one segment.
        """
        paddr = vaddr - START_KERNEL_MAP
        for segment in self.segments:
            offset = paddr - segment.paddr
            if size >= 0 and offset >= 0 and offset + size <= segment.memsz:
                return bytes(segment.data[offset : offset + size]).ljust(size, b"\0")
        raise IndexError(f"{vaddr:#x}+{size:#x} is not inside the kernel image")

    def btf(self) -> bytes:
        """The kernel's BTF, what its /sys/kernel/btf/vmlinux shows (CONFIG_DEBUG_INFO_BTF).

        It lies between the symbols __start_BTF and __stop_BTF; its own header tells as much and needs no symbols.
        Raises NotAKernel when there is none.
        """
        found = max((blob for segment in self.segments for blob in _btf_blobs(segment.data)), key=len, default=None)
        if found is None:
            raise NotAKernel(f"{self.path}: no BTF inside: a kernel with CONFIG_DEBUG_INFO_BTF=y is needed")
        return bytes(found)

    @cached_property
    def end(self) -> int:
        """The physical address after the last byte the image takes, its zeros included."""
        return max(segment.paddr + segment.memsz for segment in self.segments)


def file_sha256(path: Path) -> str:
    """The hex digest `KernelImage.load(path).sha256` would have, without unpacking; raises NotAKernel."""
    return hashlib.sha256(_read_file(path)).hexdigest()


def read_vmlinux(path: Path) -> bytes:
    """Return the ELF vmlinux at `path`, unpacked if it is a vmlinuz; raises NotAKernel."""
    return _unpack(_read_file(path), path)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise NotAKernel(f"{path}: cannot read the kernel: {error.strerror}") from None
    if len(content) > LARGEST:
        raise NotAKernel(f"{path}: not a kernel: larger than {LARGEST >> 20} MiB")
    return content


def _unpack(content: bytes, path: Path) -> bytes:
    """The ELF inside `content`, which `path` is the name of in errors."""
    if content[:4] == b"\x7fELF":
        return content
    if content[0x202:0x206] == b"HdrS":
        return _decompress(_bzimage_payload(content, path), path)
    if content[:2] == b"\x1f\x8b":  # aarch64's vmlinuz is often a gzip of the raw image
        with suppress(zlib.error):
            content = zlib.decompressobj(31).decompress(content, 64)
    if content[0x38:0x3C] == b"ARM\x64":
        raise _wrong_architecture(path, "aarch64")
    if content[4:8] == b"zimg":
        raise _wrong_architecture(path, "an EFI zboot image, which x86-64 has none of")
    raise NotAKernel(f"{path}: not a kernel: neither an ELF vmlinux nor an x86 bzImage (vmlinuz)")


def _wrong_architecture(path: Path, what: str) -> NotAKernel:
    return NotAKernel(f"{path}: a kernel for the wrong architecture: {what}; an x86-64 kernel is needed")


# The setup header, at these file offsets (boot.rst, "The Real-Mode Kernel Header").
_SETUP_SECTS = 0x1F1  # u8, in sectors of 512 bytes; 0 means 4
_PROTOCOL = 0x206  # u16, 0x020f is 2.15
_PAYLOAD = 0x248  # u32 offset from the protected-mode code, u32 length


def _bzimage_payload(content: bytes, path: Path) -> memoryview:
    if len(content) < _PAYLOAD + 8:
        raise NotAKernel(f"{path}: not a kernel: the file ends inside the setup header")
    if struct.unpack_from("<H", content, _PROTOCOL)[0] < 0x208:
        raise NotAKernel(f"{path}: too old: its boot protocol has no payload; Linux 5.15 or newer is needed")
    offset, length = struct.unpack_from("<II", content, _PAYLOAD)
    start = ((content[_SETUP_SECTS] or 4) + 1) * 512 + offset
    if length < 8 or start + length > len(content):
        raise NotAKernel(f"{path}: damaged: its payload lies outside the file; fetch it again")
    return memoryview(content)[start : start + length]


def _decompress(payload: memoryview, path: Path) -> bytes:
    """Unpack a bzImage payload: a compressed vmlinux, then its unpacked size as a little-endian u32.

    (In gzip's case that u32 is the end of the gzip stream itself, so the stream is not cut off before it.)
    """
    (size,) = struct.unpack_from("<I", payload, len(payload) - 4)
    if not 0 < size <= LARGEST:
        raise NotAKernel(f"{path}: damaged: it claims to unpack to {size} bytes; fetch it again")
    for magic, decompress in _DECOMPRESSORS:
        if payload[: len(magic)] == magic:
            try:
                unpacked = decompress(payload, size)
            except EmulatorError as error:
                raise NotAKernel(f"{path}: {error}") from None
            except Exception as error:  # every library has errors of its own
                raise NotAKernel(f"{path}: damaged: {str(error) or 'it does not unpack'}; fetch it again") from None
            if len(unpacked) != size:
                raise NotAKernel(f"{path}: damaged: {len(unpacked)} of {size} bytes unpacked; fetch it again")
            return unpacked
    raise NotAKernel(f"{path}: not a kernel: unknown compression (magic {payload[:4].hex()})")


def _gzip(payload: memoryview, size: int) -> bytes:
    return zlib.decompressobj(31).decompress(payload, size)


def _xz(payload: memoryview, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, size)


def _lzma(payload: memoryview, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, size)


def _bzip2(payload: memoryview, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size)


def _zstd(payload: memoryview, size: int) -> bytes:
    zstandard = _optional("zstandard", "zstandard", "zstd")
    # Distributions compress with `zstd --ultra -22`, whose window is 128 MiB.
    with zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(payload) as reader:
        return bytes(reader.read(size))


def _lz4(payload: memoryview, size: int) -> bytes:
    """The legacy frame: a magic, then blocks of (u32 compressed length, data), each of 8 MiB unpacked but the last."""
    block_format = _optional("lz4.block", "lz4", "lz4")
    parts: list[bytes] = []
    unpacked, offset = 0, 4
    while unpacked < size:
        (length,) = struct.unpack_from("<I", payload, offset)
        block = payload[offset + 4 : offset + 4 + length]
        if len(block) != length:
            raise ValueError("an lz4 block ends after the payload")
        parts.append(block_format.decompress(block, uncompressed_size=8 << 20))
        unpacked += len(parts[-1])
        offset += 4 + length
        if not parts[-1]:
            break
    return b"".join(parts)


def _lzo(payload: memoryview, size: int) -> bytes:
    """lzop's container: a header, then blocks of (u32 unpacked length, u32 length, checksums, data), all big-endian."""
    lzo = _optional("lzo", "python-lzo", "lzo")
    (version,) = struct.unpack_from(">H", payload, 9)
    recent = version >= 0x940
    (flags,) = struct.unpack_from(">I", payload, 17 if recent else 14)
    offset = (33 if recent else 26) + (4 if flags & 0x800 else 0)  # at the name's length
    offset += 1 + payload[offset] + 4
    checksums_unpacked = 4 * (bool(flags & 0x001) + bool(flags & 0x100))
    checksums_packed = 4 * (bool(flags & 0x002) + bool(flags & 0x200))
    parts: list[bytes] = []
    unpacked = 0
    while unpacked < size:
        whole, length = struct.unpack_from(">II", payload, offset)
        if not 0 < length <= whole <= size - unpacked:
            raise ValueError("an lzo block has an impossible length")
        # A block that would not shrink is stored as it is, without checksums of the packed form.
        offset += 8 + checksums_unpacked + (checksums_packed if length < whole else 0)
        block = bytes(payload[offset : offset + length])
        parts.append(lzo.decompress(block, False, whole) if length < whole else block)
        unpacked += whole
        offset += length
    return b"".join(parts)


def _optional(module: str, package: str, compression: str) -> Any:
    """Import a decompressor only when a kernel needs it: not every one is installed, and no mount should wait."""
    try:
        return import_module(module)
    except ImportError:
        raise EmulatorError(f"compressed with {compression}: install the Python package {package} to read it") from None


_DECOMPRESSORS: list[tuple[bytes, Callable[[memoryview, int], bytes]]] = [
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _lzma),
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4),
    (b"\x89LZO\0\r\n\x1a\n", _lzo),
]

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_MACHINES = {3: "32-bit x86", 40: "32-bit ARM", 62: "x86-64", 183: "aarch64", 243: "RISC-V", 258: "LoongArch"}


def _parse_elf(elf: bytes, path: Path) -> tuple[int, list[Segment]]:
    """The physical entry address and loadable segments of an x86-64 ELF executable."""
    if len(elf) < _ELF_HEADER.size or elf[:4] != b"\x7fELF":
        raise NotAKernel(f"{path}: not a kernel: no ELF file inside")
    ident, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = _ELF_HEADER.unpack_from(elf)
    if machine != 62 and ident[5] == 1:
        raise _wrong_architecture(path, _MACHINES.get(machine, f"ELF machine {machine}"))
    if ident[4] != 2 or ident[5] != 1:
        raise _wrong_architecture(path, "32-bit" if ident[4] == 1 else "big-endian")
    if kind != 2 or phentsize != _PROGRAM_HEADER.size or phoff + phnum * phentsize > len(elf):
        raise NotAKernel(f"{path}: not a kernel: an ELF file, but not an executable vmlinux")
    segments: list[Segment] = []
    for i in range(phnum):
        what, _, offset, _, paddr, filesz, memsz, _ = _PROGRAM_HEADER.unpack_from(elf, phoff + i * phentsize)
        if what != _PT_LOAD or memsz == 0:
            continue
        if filesz > memsz or offset + filesz > len(elf) or paddr + memsz > 2 * LARGEST:
            raise NotAKernel(f"{path}: not a kernel: its ELF segments fit neither the file nor memory")
        segments.append(Segment(paddr, memoryview(elf)[offset : offset + filesz], memsz))
    if entry >= START_KERNEL_MAP:
        entry -= START_KERNEL_MAP
    if not any(segment.paddr <= entry < segment.paddr + len(segment.data) for segment in segments):
        raise NotAKernel(f"{path}: not a kernel: an ELF file whose entry is not at a physical address of its own")
    return entry, segments


_BANNER = re.compile(rb"Linux version ((\d{1,3})\.(\d{1,3})[^ \0\n]{0,64}) \(")


def _banner(segments: list[Segment], path: Path) -> tuple[str, tuple[int, int]]:
    for segment in segments:
        if match := _BANNER.search(segment.data):
            version, release = match[1].decode("ascii", "replace"), (int(match[2]), int(match[3]))
            if release < OLDEST:
                oldest = ".".join(map(str, OLDEST))
                raise NotAKernel(f"{path}: Linux {version} is too old: {oldest} or newer is needed")
            return version, release
    raise NotAKernel(f'{path}: not a kernel: no "Linux version" inside')


# magic, version 1, flags, header length, then offsets (from the header's end) and lengths of types and strings
# (Documentation/bpf/btf.rst).
_BTF_HEADER = struct.Struct("<HBBIIIII")
_BTF_MAGIC = re.compile(rb"\x9f\xeb\x01\0")


def _btf_blobs(data: memoryview) -> Iterator[memoryview]:
    for match in _BTF_MAGIC.finditer(data):
        start = match.start()
        if start + _BTF_HEADER.size > len(data):
            return
        *_, header, types, types_length, strings, strings_length = _BTF_HEADER.unpack_from(data, start)
        length = header + strings + strings_length
        if not _BTF_HEADER.size <= header <= 256 or types + types_length > strings or start + length > len(data):
            continue
        blob = data[start : start + length]
        if types_length and strings_length and blob[header + strings] == 0 and blob[length - 1] == 0:
            yield blob
