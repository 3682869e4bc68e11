"""A program for a CPU alone: assembled here, and started in ring 0 with its own page tables, GDT, IDT and TSS.

Every vector leads to a stub that notes its number and stack pointer and halts, so a test looks at the stack frame the
CPU pushed.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from emulator.cpu.interface import Stop
from emulator.cpu.native import NativeCPU
from emulator.cpu.pure import PureCPU
from emulator.memory import PAGE, Memory

PML4, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000
GDT, IDT, TSS, NOTES, DESCRIPTORS = 0x5000, 0x6000, 0x7000, 0x8000, 0x9000
CODE, STUBS, NOTE = 0x10000, 0x12000, 0x14000
STACK, RSP0, IST1, USER_STACK = 0x20000, 0x28000, 0x2C000, 0x30000
ABSENT, READ_ONLY, SUPERVISOR = 0x50000, 0x51000, 0x52000
IO_VIRTUAL, IO_PHYSICAL = 0x200000, 0xFEE00000
KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE, TSS_SELECTOR = 0x10, 0x18, 0x2B, 0x33, 0x38
WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}
IF, SECOND = 0x200, 1_000_000_000

START = f"lidt {DESCRIPTORS}\n mov ${TSS_SELECTOR}, %ax\n ltr %ax\n mov ${STACK}, %rsp\n"


def user(flags: int = 0x202) -> str:
    """Go on in ring 3."""
    return f"""
    pushq ${USER_DATA}; pushq ${USER_STACK}; pushq ${flags}; pushq ${USER_CODE}
    lea 99f(%rip), %rax; push %rax; iretq
    99:
    """


@cache
def assemble(source: str) -> bytes:
    """Return the machine code of GNU assembler source."""
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        (at / "p.s").write_text(source + "\n")
        subprocess.run(["as", "--64", "-o", at / "p.o", at / "p.s"], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", at / "p.o", at / "p.bin"], check=True)
        return (at / "p.bin").read_bytes()


class Frame(NamedTuple):
    vector: int
    error: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


class Ports:
    """Devices: note what is written, answer reads with the port's number, and do as told."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []
        self.fail: BaseException | None = None

    def port_read(self, port: int, size: int) -> int:
        if self.fail:
            raise self.fail
        return port

    def port_write(self, port: int, size: int, value: int) -> None:
        self.written.append((port, size, value))


class Bench:
    """A CPU with 4 MiB of RAM set up for a program."""

    def __init__(self, make: type[NativeCPU] | type[PureCPU]) -> None:
        self.make = make
        self.ports = Ports()
        self.memory = Memory(4 << 20)
        self._tables()
        self.cpu = self._cpu()

    def _cpu(self) -> NativeCPU | PureCPU:
        cpu = self.make(self.ports)
        cpu.map_ram(0, self.memory.size, self.memory.host_address)
        return cpu

    def replace_cpu(self, make: type[NativeCPU] | type[PureCPU]) -> None:
        """Put a new CPU in the place of the present one."""
        self.cpu.close()
        self.make = make
        self.cpu = self._cpu()

    def _tables(self) -> None:
        memory = self.memory
        memory.write_u64(PML4, PDPT | 7)
        memory.write_u64(PDPT, PD | 7)
        memory.write_u64(PD, PT | 7)
        memory.write_u64(PD + 8, IO_PHYSICAL | 0x87)
        for page in range(512):
            memory.write_u64(PT + 8 * page, page * PAGE | 7)
        memory.write_u64(PT + ABSENT // PAGE * 8, 0)
        memory.write_u64(PT + READ_ONLY // PAGE * 8, READ_ONLY | 5)
        memory.write_u64(PT + SUPERVISOR // PAGE * 8, SUPERVISOR | 3)
        code, data = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
        ring3 = 3 << 45
        memory.write(GDT, struct.pack("<7Q", 0, 0, code, data, 0, data | ring3, code | ring3))
        memory.write_u64(TSS + 4, RSP0)
        memory.write_u64(TSS + 36, IST1)
        for vector in range(256):
            self.gate(vector)
            stub = STUBS + 16 * vector
            memory.write(stub, struct.pack("<BiBi", 0x68, vector, 0xE9, NOTE - stub - 10))  # push vector; jmp
        memory.write(NOTE, assemble(f"mov %rsp, {NOTES}\n 1: hlt\n jmp 1b"))
        self.idt_limit(0xFFF)

    def idt_limit(self, limit: int) -> None:
        """Set what the program's LIDT will load."""
        self.memory.write(DESCRIPTORS, struct.pack("<HQ", limit, IDT))

    def gate(self, vector: int, *, present: bool = True, dpl: int = 0, ist: int = 0, trap: bool = False) -> None:
        """Write a gate of the IDT."""
        at = STUBS + 16 * vector
        low = at & 0xFFFF | KERNEL_CODE << 16 | ist << 32 | (0xF if trap else 0xE) << 40 | dpl << 45
        self.memory.write(IDT + 16 * vector, struct.pack("<2Q", low | present << 47 | (at >> 16) << 48, 0))

    def load(self, source: str) -> None:
        """Assemble a program and point the CPU at it."""
        self.memory.write(CODE, assemble(START + source))
        self.cpu.flush_translations()
        self.memory.write_u64(NOTES, 0)
        free_tss = 0x67 | (TSS & 0xFFFFFF) << 16 | 0x89 << 40  # LTR marks it busy
        self.memory.write_u64(GDT + TSS_SELECTOR, free_tss)
        registers = {"cr0": 0x80010033, "cr3": PML4, "cr4": 0x620, "rsp": STACK, "rflags": 2}
        self.cpu.start_at(CODE, registers, (GDT, 9 * 8 - 1), KERNEL_CODE, KERNEL_DATA)

    def run(self, source: str | None = None, ns: int = 10_000_000, vector: int | None = None) -> Stop:
        """Run a program, or go on with the present one, for some virtual time."""
        if source is not None:
            self.load(source)
        return self.cpu.run(self.cpu.now + ns, vector=vector)

    def frame(self) -> Frame:
        """Return the stack frame of the stub that was reached."""
        rsp = self.memory.read_u64(NOTES)
        assert rsp, "no handler was reached"
        words = struct.unpack("<7Q", self.memory.read(rsp, 56))
        if words[0] in WITH_ERROR_CODE and words[2] != KERNEL_CODE and words[2] != USER_CODE:
            return Frame(*words)
        return Frame(words[0], None, *words[1:6])

    def exception(self, source: str, ns: int = 10_000_000) -> Frame:
        """Run a program that ends in a handler."""
        assert self.run(source, ns) is Stop.HALTED
        return self.frame()
