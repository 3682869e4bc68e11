from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from emulator.kernel import image
from emulator.kernel.image import KernelImage, NotAKernel, file_sha256, read_vmlinux
from tests.tiny_kernel import BANNER, BASE, LOAD, bzimage, elf, lz4_legacy

VMLINUX = elf([b"\x90" * 64 + BANNER, b"data" * 100], bss=4096)

PACKED = {
    "gzip": None,
    "xz": lzma.compress(VMLINUX, lzma.FORMAT_XZ, lzma.CHECK_CRC32),
    "lzma": lzma.compress(VMLINUX, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress(VMLINUX),
    "zstd": zstandard.ZstdCompressor(level=22).compress(VMLINUX),
    "zstd without a size": zstandard.ZstdCompressor(write_content_size=False).compress(VMLINUX),
    "lz4": lz4_legacy(VMLINUX),
}


def write(directory: Path, content: bytes) -> Path:
    path = directory / "vmlinuz"
    path.write_bytes(content)
    return path


def test_vmlinux_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, VMLINUX)
    assert read_vmlinux(path) == VMLINUX
    kernel = KernelImage.load(path)
    assert (kernel.version, kernel.release, kernel.entry) == ("6.12.3-test", (6, 12), LOAD)
    assert [(part.paddr, bytes(part.data), part.memsz) for part in kernel.segments] == [
        (LOAD, b"\x90" * 64 + BANNER, 64 + len(BANNER)),
        (LOAD + (1 << 20), b"data" * 100, 400 + 4096),
    ]
    assert kernel.end == LOAD + (1 << 20) + 400 + 4096
    assert kernel.sha256 == file_sha256(path) == hashlib.sha256(VMLINUX).hexdigest()


@pytest.mark.parametrize("compression", PACKED)
def test_every_compression(tmp_path: Path, compression: str) -> None:
    assert read_vmlinux(write(tmp_path, bzimage(VMLINUX, PACKED[compression]))) == VMLINUX


def test_lz4_with_more_than_one_block(tmp_path: Path) -> None:
    vmlinux = elf([BANNER + bytes(17 << 20)])
    assert read_vmlinux(write(tmp_path, bzimage(vmlinux, lz4_legacy(vmlinux)))) == vmlinux


def test_setup_sects_of_0_means_4(tmp_path: Path) -> None:
    content = bytearray(bzimage(VMLINUX))
    content[0x1F1] = 0
    content[512 * 3 : 512 * 3] = bytes(512 * 2)
    assert read_vmlinux(write(tmp_path, bytes(content))) == VMLINUX


def lzop(data: bytes) -> bytes:
    """lzop's container with one block "compressed" (by zlib, for want of lzo) and one stored."""
    header = struct.pack(">HHHBBIIIIB", 0x1030, 0x2080, 0x940, 3, 9, 0x3, 0o644, 0, 0, 2) + b"hi" + bytes(4)
    half = len(data) // 2
    packed = zlib.compress(data[:half])
    blocks = struct.pack(">IIII", half, len(packed), 0, 0) + packed
    blocks += struct.pack(">III", len(data) - half, len(data) - half, 0) + data[half:] + bytes(4)
    return b"\x89LZO\0\r\n\x1a\n" + header + blocks


def test_lzo_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(decompress=lambda block, header, size: zlib.decompress(block))
    monkeypatch.setitem(sys.modules, "lzo", module)
    assert read_vmlinux(write(tmp_path, bzimage(VMLINUX, lzop(VMLINUX)))) == VMLINUX


def test_lzo_without_its_module_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzo", None)
    with pytest.raises(NotAKernel, match="compressed with lzo: install the Python package python-lzo"):
        read_vmlinux(write(tmp_path, bzimage(VMLINUX, lzop(VMLINUX))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither an ELF vmlinux nor an x86 bzImage"),
        (b"#!/bin/sh\n" * 100, "neither an ELF vmlinux"),
        (b"\x1f\x8b not really", "neither an ELF vmlinux"),
        (elf([BANNER], machine=183), "wrong architecture: aarch64"),
        (elf([BANNER], machine=3, bits=1), "wrong architecture: 32-bit x86"),
        (elf([BANNER], bits=1), "wrong architecture: 32-bit"),
        (elf([BANNER], machine=999), "wrong architecture: ELF machine 999"),
        (bytes(0x38) + b"ARM\x64" + bytes(64), "wrong architecture: aarch64"),
        (gzip.compress(bytes(0x38) + b"ARM\x64" + bytes(64)), "wrong architecture: aarch64"),
        (b"MZ\0\0zimg" + bytes(64), "wrong architecture: an EFI zboot"),
        (bzimage(elf([BANNER], machine=3, bits=1)), "wrong architecture: 32-bit x86"),
        (elf([BANNER], kind=3), "not an executable vmlinux"),
        (elf([BANNER], entry=0), "entry is not at a physical address"),
        (elf([b"nothing here"]), 'no "Linux version" inside'),
        (elf([b"Linux version 5.10.0-9-amd64 (x)"]), "Linux 5.10.0-9-amd64 is too old: 5.15 or newer"),
        (elf([b"Linux version 4.19 (x)"]), "Linux 4.19 is too old"),
        (VMLINUX[:40], "no ELF file inside"),
        (VMLINUX[:100], "not an executable vmlinux"),
        (VMLINUX[:-10], "segments fit neither the file nor memory"),
        (bzimage(VMLINUX, protocol=0x207), "too old: its boot protocol"),
        (bzimage(VMLINUX)[:0x220], "ends inside the setup header"),
        (bzimage(VMLINUX)[:-1], "payload lies outside the file"),
        (bzimage(VMLINUX, b"what is this"), r"unknown compression \(magic 77686174\)"),
        (bzimage(VMLINUX, PACKED["xz"], size=1 << 30), "claims to unpack to 1073741824 bytes"),
        (bzimage(VMLINUX, PACKED["xz"], size=len(VMLINUX) + 1), "damaged: .* bytes unpacked"),
        (bzimage(VMLINUX, b"\x02\x21\x4c\x18\xff\xff\0\0"), "damaged"),
        (bzimage(VMLINUX, b"\x28\xb5\x2f\xfd nonsense"), "damaged"),
        (bzimage(b"not an ELF file", None), "no ELF file inside"),
    ],
)
def test_what_is_not_a_kernel_is_told_in_a_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(NotAKernel, match=message) as raised:
        KernelImage.load(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_unreadable_files_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(NotAKernel, match="cannot read the kernel: No such file"):
        KernelImage.load(tmp_path / "none")
    with pytest.raises(NotAKernel, match="cannot read the kernel: Is a directory"):
        file_sha256(tmp_path)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd", "lz4", "bzip2", "lzma"])
def test_no_more_is_unpacked_than_the_size_says(tmp_path: Path, compression: str) -> None:
    """A payload that unpacks to far more than it says is cut or refused, not unpacked."""
    compress: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "xz": lzma.compress,
        "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
        "zstd": zstandard.compress,
        "lz4": lz4_legacy,
        "bzip2": bz2.compress,
    }
    path = write(tmp_path, bzimage(b"", compress[compression](bytes(4 << 20)), size=1000))
    with pytest.raises(NotAKernel):
        KernelImage.load(path)


def test_read_by_virtual_address(tmp_path: Path) -> None:
    kernel = KernelImage.load(write(tmp_path, VMLINUX))
    assert kernel.read(BASE + 64, 13) == b"Linux version"
    second = BASE + (1 << 20)
    assert kernel.read(second + 396, 8) == b"data\0\0\0\0"
    assert kernel.read(second + 400 + 4096, 0) == b""
    for vaddr, size in [(BASE - 1, 1), (BASE + 64 + len(BANNER), 1), (second + 4400, 4096), (BASE, -1), (0, 8)]:
        with pytest.raises(IndexError):
            kernel.read(vaddr, size)


def btf(types: bytes, strings: bytes, header: int = 24) -> bytes:
    fields = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, header, 0, len(types), len(types), len(strings))
    return fields.ljust(header, b"\0") + types + strings


@pytest.mark.parametrize("header", [24, 32])
def test_btf_is_found_among_what_looks_like_it(tmp_path: Path, header: int) -> None:
    blob = btf(b"types..." * 9, b"\0int\0", header)
    lookalikes = btf(b"t", b"no zero first\0") + btf(b"", b"\0") + struct.pack("<HBBI", 0xEB9F, 1, 0, 24)
    kernel = KernelImage.load(write(tmp_path, elf([BANNER + lookalikes + b"pad", b"x" * 5 + blob + b"after" * 9])))
    assert kernel.btf() == blob


def test_no_btf_is_told(tmp_path: Path) -> None:
    kernel = KernelImage.load(write(tmp_path, elf([BANNER + btf(b"t" * 100, b"\0cut off")[:40]])))
    with pytest.raises(NotAKernel, match="CONFIG_DEBUG_INFO_BTF=y"):
        kernel.btf()


@given(st.data())
def test_damage_never_escapes_as_another_error(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([VMLINUX, *(bzimage(VMLINUX, packed) for packed in PACKED.values())])))
    for _ in range(data.draw(st.integers(0, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    is_a_kernel_or_told(content)


@given(st.binary(max_size=700))
def test_any_bytes(content: bytes) -> None:
    for whole in (content, b"\x7fELF" + content, bytes(0x202) + b"HdrS\x0f\x02" + content):
        is_a_kernel_or_told(whole)


def is_a_kernel_or_told(content: bytes) -> None:
    path = Path("vmlinuz")
    with suppress(NotAKernel):
        image._parse_elf(image._unpack(content, path), path)
