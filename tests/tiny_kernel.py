"""Build small kernel images for tests: an ELF vmlinux, a bzImage around it, and the kallsyms tables inside it."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from importlib import import_module

LOAD = 0x100_0000  # physical address of the first segment, as Linux's CONFIG_PHYSICAL_START
BASE = 0xFFFF_FFFF_8000_0000 + LOAD  # its virtual address
BANNER = b"Linux version 6.12.3-test (someone@somewhere) #1\n\0"


def elf(
    segments: list[bytes],
    *,
    entry: int = LOAD,
    machine: int = 62,
    bits: int = 2,
    kind: int = 2,
    sections: Sequence[tuple[int, int, int, int, int]] | None = None,
    tail: bytes = b"",
    bss: int = 0,
) -> bytes:
    """An ELF executable with one segment for each of `segments`, 1 MiB apart; the last has `bss` zero bytes after it.

    `sections` are (type, flags, offset in `tail`, size, link) of section headers after the empty first one.
    """
    headers = b""
    offset = 64 + 56 * len(segments)
    for i, data in enumerate(segments):
        paddr = LOAD + (i << 20)
        memsz = len(data) + (bss if i == len(segments) - 1 else 0)
        headers += struct.pack("<IIQQQQQQ", 1, 7, offset, paddr | 0xFFFF_FFFF_8000_0000, paddr, len(data), memsz, 4096)
        offset += len(data)
    rows = b""
    if sections is not None:
        rows = bytes(64)
        for what, flags, where, size, link in sections:
            rows += struct.pack("<IIQQQQIIQQ", 0, what, flags, 0, offset + where, size, link, 0, 1, 0)
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    shoff = offset + len(tail) if rows else 0
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        ident, kind, machine, 1, entry, 64, shoff, 0, 64, 56, len(segments), 64, len(rows) // 64, 0,
    )  # fmt: skip
    return header + headers + b"".join(segments) + tail + rows


def bzimage(vmlinux: bytes, packed: bytes | None = None, *, size: int | None = None, protocol: int = 0x20F) -> bytes:
    """A bzImage with the payload `packed`, to which the unpacked size is added as the kernel's build does it."""
    if packed is None:
        payload = gzip.compress(vmlinux, mtime=0)  # ends with the size already
    else:
        payload = packed + struct.pack("<I", len(vmlinux) if size is None else size)
    code = b"\x90" * 64
    image = bytearray(512 * 3)  # boot sector, two setup sectors
    image[0x1F1] = 2
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, len(code), len(payload))
    return bytes(image) + code + payload


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    """The lz4 legacy frame, which the kernel's build uses."""
    lz4_block = import_module("lz4.block")
    packed = b"\x02\x21\x4c\x18"
    for i in range(0, len(data), block):
        part = lz4_block.compress(data[i : i + block], store_size=False)
        packed += struct.pack("<I", len(part)) + part
    return packed


Row = tuple[int, str, str]  # address, type letter, name


def kallsyms_tables(rows: list[Row], layout: str, place: int) -> bytes:
    """The kallsyms tables as the kernel of a time has them, to lie at the virtual address `place` (8 byte aligned).

    Layouts: "5.15" (addresses first, per-CPU absolute), "6.2" (the same with sequence numbers), "6.4" (addresses last,
    per-CPU absolute), "6.15" (no absolute per-CPU addresses), "7.0" (addresses relative to their place).
    """
    tokens = [bytes([i]) if chr(i).isalnum() or chr(i) in "_.$" else b"pair%d" % i for i in range(256)]
    tokens[0], tokens[1] = b"vfs_", b"irq"  # some that names use
    names, markers = b"", []
    for i, (_, letter, name) in enumerate(rows):
        if i % 256 == 0:
            markers.append(len(names))
        line = (letter + name).encode().replace(b"vfs_", b"\0").replace(b"irq", b"\1")
        length = bytes([len(line)]) if len(line) < 128 else bytes([len(line) & 127 | 128, len(line) >> 7])
        names += length + line
    table = b"".join(token + b"\0" for token in tokens)
    index = struct.pack("<256H", *(sum(len(token) + 1 for token in tokens[:i]) for i in range(256)))
    count = _padded(struct.pack("<I", len(rows)))
    sequence = _padded(b"".join(i.to_bytes(3, "big") for i in range(len(rows))))
    middle = count + _padded(names) + _padded(struct.pack(f"<{len(markers)}I", *markers))
    base = _padded(struct.pack("<Q", BASE))
    absolute = layout in ("5.15", "6.2", "6.4")
    offsets = [a if absolute and a < BASE else BASE - 1 - a if absolute else a - BASE for a, _, _ in rows]
    if layout in ("5.15", "6.2"):
        packed = _padded(struct.pack(f"<{len(rows)}i", *offsets)) + base + middle
        return packed + (sequence if layout == "6.2" else b"") + _padded(table) + index
    packed = middle + _padded(table) + index
    if layout == "7.0":
        start = place + len(packed)
        packed += struct.pack(f"<{len(rows)}i", *(a - (start + 4 * i) for i, (a, _, _) in enumerate(rows)))
        return packed + sequence
    return packed + _padded(struct.pack(f"<{len(rows)}i", *offsets)) + base + sequence


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
