"""The 64-bit Linux boot protocol: what a boot loader leaves in memory and registers before `startup_64`.

Follows Documentation/arch/x86/boot.rst ("64-bit boot protocol") and zero-page.rst; offsets are those of boot_params.
The kernel is a plain vmlinux, so no decompressor runs and no address is randomised.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from emulator import acpi
from emulator.cpu.interface import CPU
from emulator.errors import EmulatorError
from emulator.kernel.image import KernelImage
from emulator.memory import PAGE, Memory

_BOOT_PARAMS = 0x10000
_COMMAND_LINE = 0x20000
_PAGE_TABLES = 0x30000
_GDT = 0x40000
_STACK = 0x8F000
_LOW_MEMORY_END = 0x9FC00
_ACPI_AREA = 0xE0000
_HIGH_MEMORY = 0x100000
_CODE_SELECTOR, _DATA_SELECTOR = 0x10, 0x18
_E820_RAM, _E820_RESERVED = 1, 2
_COMMAND_LINE_MAX = 2047
_ROOM = 32 << 20  # bytes of RAM a kernel needs beside its image to boot


@dataclass(frozen=True)
class BootImage:
    """What is booted: the kernel, its command line and an initramfs (newc cpio, may be compressed)."""

    kernel: KernelImage
    command_line: str
    initramfs: bytes
    cpus: int = 1


def _boot_params(image: BootImage, initramfs_at: int, ram_size: int) -> bytes:
    params = bytearray(PAGE)
    struct.pack_into("<H", params, 0x1FE, 0xAA55)  # boot_flag
    params[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", params, 0x206, 0x020F)  # protocol version
    params[0x210] = 0xFF  # type_of_loader: unregistered
    params[0x211] = 1  # loadflags: LOADED_HIGH
    struct.pack_into("<II", params, 0x218, initramfs_at, len(image.initramfs))
    struct.pack_into("<I", params, 0x228, _COMMAND_LINE)
    struct.pack_into("<I", params, 0x230, 0x200000)  # kernel_alignment
    params[0x234] = 1  # relocatable_kernel
    struct.pack_into("<I", params, 0x238, _COMMAND_LINE_MAX)
    ranges = (
        (0, _LOW_MEMORY_END, _E820_RAM),
        (_LOW_MEMORY_END, 0xA0000 - _LOW_MEMORY_END, _E820_RESERVED),
        (_ACPI_AREA, _HIGH_MEMORY - _ACPI_AREA, _E820_RESERVED),
        (_HIGH_MEMORY, ram_size - _HIGH_MEMORY, _E820_RAM),
    )
    params[0x1E8] = len(ranges)
    for index, entry in enumerate(ranges):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * index, *entry)
    return bytes(params)


def _identity_map() -> bytes:
    """Page tables for the first 4 GiB in 2 MiB pages: one PML4, one PDPT, four page directories."""
    present_writable_user, large_accessed_dirty = 0x7, 0xE7
    tables = bytearray(6 * PAGE)
    struct.pack_into("<Q", tables, 0, _PAGE_TABLES + PAGE | present_writable_user)
    for gib in range(4):
        struct.pack_into("<Q", tables, PAGE + 8 * gib, _PAGE_TABLES + (2 + gib) * PAGE | present_writable_user)
        for index in range(512):
            struct.pack_into("<Q", tables, (2 + gib) * PAGE + 8 * index, gib << 30 | index << 21 | large_accessed_dirty)
    return bytes(tables)


def load(image: BootImage, memory: Memory, ram_size: int, cpu: CPU) -> None:
    """Put the kernel and all it is told into RAM (bytes 0..ram_size) and point the CPU at its entry.

    Raises EmulatorError when RAM is too small or the command line too long.
    """
    kernel_end = max(segment.paddr + segment.memsz for segment in image.kernel.segments)
    initramfs_at = (ram_size - len(image.initramfs)) // PAGE * PAGE
    if initramfs_at < kernel_end + _ROOM:
        need = (kernel_end + len(image.initramfs) + _ROOM >> 20) + 1
        raise EmulatorError(f"{ram_size >> 20} MiB of guest memory are too little for this kernel: --memory {need}M")
    line = image.command_line.encode()
    if len(line) > _COMMAND_LINE_MAX:
        raise EmulatorError(f"the kernel command line is longer than {_COMMAND_LINE_MAX} bytes: shorten it")
    for segment in image.kernel.segments:
        memory.write(segment.paddr, segment.data)
    memory.write(initramfs_at, image.initramfs)
    memory.write(_BOOT_PARAMS, _boot_params(image, initramfs_at, ram_size))
    memory.write(_COMMAND_LINE, line + b"\0")
    memory.write(_PAGE_TABLES, _identity_map())
    for physical, table in acpi.tables(image.cpus).items():
        memory.write(physical, table)
    gdt = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    memory.write(_GDT, gdt)
    registers = {
        "cr0": 0x80010033,  # PG WP NE ET MP PE
        "cr3": _PAGE_TABLES,
        "cr4": 0x20,  # PAE; EFER.LME is set in Unicorn's 64-bit mode
        "rsp": _STACK,
        "rsi": _BOOT_PARAMS,
        "rflags": 2,
    }
    cpu.start_at(image.kernel.entry, registers, (_GDT, len(gdt) - 1), _CODE_SELECTOR, _DATA_SELECTOR)
