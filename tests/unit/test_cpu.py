"""Both CPUs run the same small 64-bit programs, and the same is expected of them (Intel SDM vol. 3, chapters 4 to 6).

A program is assembled here and started in ring 0 with its own page tables, GDT, IDT and TSS. Every vector leads to a
stub that notes its number and stack pointer and halts, so a test looks at the stack frame the CPU pushed.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from emulator.cpu.interface import GuestDied, Stop
from emulator.cpu.native import NativeCPU
from emulator.cpu.pure import PureCPU
from emulator.cpu.unicorn_cpu import HYPERCALL_LEAF
from emulator.errors import EmulatorError
from emulator.memory import PAGE, Memory

pytestmark = pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="needs binutils")

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


@pytest.fixture(params=[NativeCPU, PureCPU], ids=["native", "pure"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.cpu.close()
    bench.memory.close()


@pytest.mark.parametrize(
    ("mode", "access", "error"),
    [
        ("", f"mov {ABSENT + 0x123}, %al", 0),
        ("", f"mov %al, {ABSENT + 0x123}", 2),
        ("", f"mov %al, {READ_ONLY + 0x123}", 3),
        (user(), f"mov {ABSENT + 0x123}, %al", 4),
        (user(), f"mov {SUPERVISOR + 0x123}, %al", 5),
        (user(), f"mov %al, {READ_ONLY + 0x123}", 7),
    ],
)
def test_page_fault(bench: Bench, mode: str, access: str, error: int) -> None:
    frame = bench.exception(f"{mode} lea 1f(%rip), %rbx\n 1: {access}")
    assert (frame.vector, frame.error) == (14, error)
    assert frame.rip == bench.cpu.read("rbx")
    assert bench.cpu.read("cr2") & 0xFFF == 0x123
    assert (frame.cs, frame.ss) == ((USER_CODE, USER_DATA) if mode else (KERNEL_CODE, KERNEL_DATA))
    assert frame.rsp == (USER_STACK if mode else STACK)
    assert bench.cpu.read("cs") == KERNEL_CODE
    assert not bench.cpu.read("rflags") & IF


def test_a_fault_in_a_handler_is_a_fault_of_its_own(bench: Bench) -> None:
    """Exceptions one after the other, each in the handler of the one before, are not a double fault."""
    bench.memory.write(STUBS + 16 * 14, assemble("ud2"))
    frame = bench.exception(f"mov {ABSENT}, %al")
    assert (frame.vector, frame.error, frame.rip) == (6, None, STUBS + 16 * 14)


def test_general_protection(bench: Bench) -> None:
    frame = bench.exception("mov $0x1230, %ax\n mov %ax, %ds")
    assert (frame.vector, frame.error) == (13, 0x1230)


def test_privileged_instruction_in_ring_3(bench: Bench) -> None:
    frame = bench.exception(user() + "cli\n hlt")
    assert (frame.vector, frame.error, frame.cs) == (13, 0, USER_CODE)


def test_divide_error(bench: Bench) -> None:
    frame = bench.exception("xor %ecx, %ecx\n lea 1f(%rip), %rbx\n 1: div %ecx")
    assert (frame.vector, frame.error, frame.rip) == (0, None, bench.cpu.read("rbx"))


def test_invalid_opcode(bench: Bench) -> None:
    frame = bench.exception("lea 1f(%rip), %rbx\n 1: ud2")
    assert (frame.vector, frame.error, frame.rip) == (6, None, bench.cpu.read("rbx"))


def test_breakpoint_in_ring_3(bench: Bench) -> None:
    bench.gate(3, dpl=3)
    frame = bench.exception(user(0x246) + "lea 1f(%rip), %rbx\n int3\n 1: jmp 1b")
    assert (frame.vector, frame.error, frame.rip, frame.cs) == (3, None, bench.cpu.read("rbx"), USER_CODE)
    assert frame.rflags & ~0x10000 == 0x246


def test_software_interrupt_needs_a_gate_for_its_ring(bench: Bench) -> None:
    frame = bench.exception(user() + "int $0x80")
    assert (frame.vector, frame.error) == (13, 0x80 * 16 + 2)


def test_software_interrupt_pushes_no_error_code(bench: Bench) -> None:
    bench.gate(13, dpl=3)
    frame = bench.exception(user() + "lea 1f(%rip), %rbx\n int $13\n 1: jmp 1b")
    assert (frame.vector, frame.error, frame.rip) == (13, None, bench.cpu.read("rbx"))


def test_stack_alignment(bench: Bench) -> None:
    frame = bench.exception("sub $3, %rsp\n ud2")
    assert frame.rsp == STACK - 3
    assert bench.memory.read_u64(NOTES) == STACK - 16 - 5 * 8 - 8


def test_ring_3_switches_to_rsp0(bench: Bench) -> None:
    bench.exception(user() + "ud2")
    assert bench.memory.read_u64(NOTES) == RSP0 - 5 * 8 - 8


@pytest.mark.parametrize("mode", ["", user()], ids=["ring0", "ring3"])
def test_interrupt_stack_table(bench: Bench, mode: str) -> None:
    bench.gate(6, ist=1)
    frame = bench.exception(mode + "ud2")
    assert bench.memory.read_u64(NOTES) == IST1 - 5 * 8 - 8
    assert frame.rsp == (USER_STACK if mode else STACK)


def test_trap_gate_leaves_interrupts_on(bench: Bench) -> None:
    bench.gate(3, trap=True)
    bench.exception("sti\n nop\n int3")
    assert bench.cpu.read("rflags") & IF


def test_double_fault(bench: Bench) -> None:
    """A page fault whose gate is not there."""
    bench.gate(14, present=False)
    frame = bench.exception(f"mov {ABSENT}, %al")
    assert (frame.vector, frame.error) == (8, 0)


def test_double_fault_on_a_bad_stack(bench: Bench) -> None:
    bench.gate(8, ist=1)
    frame = bench.exception(f"mov ${ABSENT + 0x800}, %rsp\n ud2\n nop")
    assert (frame.vector, frame.error) == (8, 0)
    assert frame.rsp == ABSENT + 0x800


def test_triple_fault(bench: Bench) -> None:
    bench.idt_limit(0)
    with pytest.raises(GuestDied, match="triple fault"):
        bench.run("ud2")


SYSCALL = f"""
    mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr            # EFER.SCE
    mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x00200010, %edx; wrmsr
    mov $0xc0000082, %ecx; lea 10f(%rip), %rax; xor %edx, %edx; wrmsr
    mov $0xc0000084, %ecx; mov $0x700, %eax; xor %edx, %edx; wrmsr
    {user(0x603)}                                               # DF and CF on
    lea 20f(%rip), %rbx
    syscall
20: pushfq; pop %r13
    int $0x80
10: mov %rcx, %r8; mov %r11, %r9
    mov %cs, %r10d; mov %ss, %r12d
    pushfq; pop %r14
    mov %rsp, %r15
    sysretq
"""


def test_syscall_and_sysret(bench: Bench) -> None:
    bench.gate(0x80, dpl=3)
    frame = bench.exception(SYSCALL)
    read = bench.cpu.read
    assert (frame.vector, frame.cs, frame.ss, frame.rsp) == (0x80, USER_CODE, USER_DATA, USER_STACK)
    assert read("r8") == read("rbx")
    assert read("r9") & 0xFFF == 0x603
    assert (read("r10"), read("r12")) == (KERNEL_CODE, KERNEL_DATA)
    assert read("r14") & 0xFFF == 0x003
    assert read("r13") & 0xFFF == 0x603
    assert read("r15") == USER_STACK


@pytest.mark.parametrize("mode", ["sti\n", user()], ids=["ring0", "ring3"])
def test_interrupt(bench: Bench, mode: str) -> None:
    assert bench.run(f"{mode} lea 1f(%rip), %rbx\n 1: jmp 1b") is Stop.DEADLINE
    assert bench.cpu.interruptible
    assert bench.run(vector=0x41) is Stop.HALTED
    frame = bench.frame()
    assert (frame.vector, frame.rip) == (0x41, bench.cpu.read("rbx"))
    assert frame.cs == (USER_CODE if mode == user() else KERNEL_CODE)
    assert frame.rflags & IF
    assert not bench.cpu.interruptible


def test_interrupts_off(bench: Bench) -> None:
    assert bench.run("cli\n 1: jmp 1b") is Stop.DEADLINE
    assert not bench.cpu.interruptible


def test_window_opens_behind_the_sti_shadow(bench: Bench) -> None:
    """An interrupt waits for IF and for the instruction behind STI."""
    bench.load("mov $1000, %ecx\n 1: loop 1b\n lea 2f(%rip), %rbx\n sti\n inc %rcx\n 2: jmp 2b")
    assert bench.cpu.run(bench.cpu.now + SECOND, window=True) is Stop.WINDOW
    assert (bench.cpu.read("rip"), bench.cpu.read("rcx")) == (bench.cpu.read("rbx"), 1)
    assert bench.cpu.interruptible


def test_window_is_found_between_sti_and_cli(bench: Bench) -> None:
    bench.load("1: mov $100, %ecx\n 2: loop 2b\n sti\n nop\n nop\n cli\n jmp 1b")
    assert bench.cpu.run(bench.cpu.now + SECOND, window=True) is Stop.WINDOW
    assert bench.cpu.interruptible


def test_window_and_vector(bench: Bench) -> None:
    """The next interrupt waits until the handler of this one lets it in."""
    bench.memory.write(STUBS + 16 * 0x41, assemble("incl %ebp\n iretq"))
    assert bench.run("xor %ebp, %ebp\n sti\n 1: jmp 1b") is Stop.DEADLINE
    assert bench.cpu.run(bench.cpu.now + SECOND, vector=0x41, window=True) is Stop.WINDOW
    assert bench.cpu.read("rbp") == 1


def test_halt_ends_with_an_interrupt(bench: Bench) -> None:
    bench.memory.write(STUBS + 16 * 0x41, assemble("iretq"))
    program = "xor %ebp, %ebp\n 1: sti\n hlt\n cli\n inc %ebp\n jmp 1b"
    assert bench.run(program) is Stop.HALTED
    for count in range(5):
        assert bench.cpu.interruptible
        assert bench.cpu.read("rbp") == count
        assert bench.run(vector=0x41) is Stop.HALTED


def test_bytes_that_look_like_halt(bench: Bench) -> None:
    """A displacement of 0xf4, in front of every instruction boundary a slice may end at."""
    program = f"mov ${STACK}, %rbp\n 1: mov -12(%rbp), %eax\n mov -12(%rbp), %ecx\n mov -12(%rbp), %edx\n jmp 1b"
    bench.load(program)
    for ns in range(900, 1000):
        assert bench.run(ns=ns) is Stop.DEADLINE


def test_tsc_is_monotonic_and_virtual(bench: Bench) -> None:
    program = """
        xor %r8d, %r8d
        mov $5000, %r9d
    1:  rdtsc
        shl $32, %rdx; or %rdx, %rax
        cmp %r8, %rax; jb 2f
        mov %rax, %r8
        rdtscp
        shl $32, %rdx; or %rdx, %rax
        cmp %r8, %rax; jb 2f
        mov %rax, %r8
        dec %r9d; jnz 1b
        int $0x80
    2:  ud2
    """
    frame = bench.exception(program, SECOND)
    assert frame.vector == 0x80
    assert 0 < bench.cpu.read("r8") <= bench.cpu.now


def cpuid(bench: Bench, leaf: int, subleaf: int) -> tuple[int, ...]:
    """Return EAX, EBX, ECX, EDX of a leaf."""
    frame = bench.exception(f"mov ${leaf}, %eax\n mov ${subleaf}, %ecx\n cpuid\n int $0x80")
    assert frame.vector == 0x80
    return tuple(bench.cpu.read(register) for register in ("rax", "rbx", "rcx", "rdx"))


def test_cpuid_is_the_same() -> None:
    leaves = [*((leaf, 0) for leaf in (*range(0x18), *range(0x80000000, 0x80000009))), (4, 1), (7, 1), (13, 1), (13, 2)]
    answers = []
    for make in (NativeCPU, PureCPU):
        bench = Bench(make)
        answers.append({leaf: cpuid(bench, *leaf) for leaf in leaves})
        bench.cpu.close()
        bench.memory.close()
    assert answers[0] == answers[1]
    assert answers[0][0, 0][0] == 0x16
    assert not answers[0][1, 0][2] & 1 << 30
    assert answers[0][1, 0][3] & 1 << 9


def test_hypercall(bench: Bench) -> None:
    """The jump ends the translation block: the native CPU runs it to its end before it stops."""
    program = f"mov ${HYPERCALL_LEAF}, %eax\n mov $5, %ecx\n cpuid\n jmp 1f\n 1: mov %eax, %ebp\n int $0x80"
    assert bench.run(program) is Stop.HYPERCALL
    assert bench.cpu.read("rcx") == 5
    bench.cpu.write("rax", 77)
    assert bench.run() is Stop.HALTED
    assert (bench.frame().vector, bench.cpu.read("rbp")) == (0x80, 77)


def test_trap(bench: Bench) -> None:
    """The CPU stops in front of a function, and goes on into it or, with RIP moved, elsewhere."""
    program = "xor %ebp, %ebp\n lea 2f(%rip), %rbx\n 1: call 2f\n jmp 1b\n 2: inc %ebp\n ret"
    function = CODE + len(assemble(START + program)) - 3
    bench.cpu.add_trap(function)
    assert bench.run(program) is Stop.TRAP
    for passed in range(3):
        assert (bench.cpu.read("rip"), bench.cpu.read("rbp"), bench.cpu.read("rbx")) == (function, passed, function)
        bench.cpu.pass_trap()
        assert bench.run() is Stop.TRAP
    bench.cpu.write("rip", function + 2)
    assert bench.run() is Stop.TRAP
    assert bench.cpu.read("rbp") == 3


def test_deadline(bench: Bench) -> None:
    bench.load("1: jmp 1b")
    before = bench.cpu.now
    for deadline in (before + 1000, before + 100_000, before + 1_000_000):
        assert bench.cpu.run(deadline) is Stop.DEADLINE
        assert deadline <= bench.cpu.now < deadline + 100


def test_time_is_the_same_every_time(bench: Bench) -> None:
    def once() -> list[int]:
        bench.cpu.now = 0
        program = "rdtsc\n mov %eax, %r8d\n mov $30000, %ecx\n 1: loop 1b\n in $0x42, %al\n rdtsc\n sti\n hlt"
        assert bench.run(program) is Stop.HALTED
        return [bench.cpu.read("r8"), bench.cpu.read("rax"), bench.cpu.now]

    first = once()
    bench.replace_cpu(bench.make)
    assert once() == first
    assert first == sorted(first)


def test_time_can_be_set(bench: Bench) -> None:
    bench.load("rdtsc\n 1: jmp 1b")
    bench.cpu.now = 5 * SECOND
    assert bench.run(ns=100_000) is Stop.DEADLINE
    assert 5 * SECOND <= bench.cpu.read("rdx") << 32 | bench.cpu.read("rax") < 6 * SECOND


def test_stop_from_another_thread(bench: Bench) -> None:
    bench.load("1: jmp 1b")
    timer = threading.Timer(0.02, bench.cpu.stop)
    timer.start()
    assert bench.cpu.run(bench.cpu.now + 10_000 * SECOND) is Stop.STOPPED
    timer.join()
    assert bench.run() is Stop.DEADLINE


def test_stop_before_the_run(bench: Bench) -> None:
    bench.load("1: jmp 1b")
    bench.cpu.stop()
    assert bench.run(ns=SECOND) is Stop.STOPPED


def test_readable_descriptor_ends_the_run(bench: Bench) -> None:
    reader, writer = os.pipe()
    try:
        bench.load("1: jmp 1b")
        bench.cpu.watch([reader])
        assert bench.run() is Stop.DEADLINE
        os.write(writer, b"x")
        assert bench.run(ns=SECOND) is Stop.READY
        bench.cpu.watch([])
        assert bench.run() is Stop.DEADLINE
        with pytest.raises(ValueError, match="at most"):
            bench.cpu.watch([reader] * 9)
    finally:
        os.close(reader)
        os.close(writer)


def test_ports(bench: Bench) -> None:
    assert bench.run("in $0x42, %al\n mov $0x3f8, %dx\n mov $0x1234, %eax\n out %ax, %dx\n int $0x80") is Stop.HALTED
    assert bench.ports.written == [(0x3F8, 2, 0x1234)]


def test_device_may_raise(bench: Bench) -> None:
    bench.ports.fail = OSError("a device")
    with pytest.raises(OSError, match="a device"):
        bench.run("in $0x42, %al\n 1: jmp 1b", SECOND)
    bench.ports.fail = None
    assert bench.run() is Stop.DEADLINE


def test_device_may_shorten_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []

    def port_write(port: int, size: int, value: int) -> None:
        deadlines.append(bench.cpu.now + value)
        bench.cpu.shorten(deadlines[-1])

    monkeypatch.setattr(bench.ports, "port_write", port_write)
    bench.load("mov $50000, %eax\n out %eax, $0x40\n xor %eax, %eax\n 1: inc %rax\n jmp 1b")
    assert bench.cpu.run(bench.cpu.now + 100 * SECOND) is Stop.DEADLINE
    assert deadlines[0] <= bench.cpu.now < deadlines[0] + 10_000


def test_memory_mapped_device(bench: Bench) -> None:
    written = []
    bench.cpu.map_io(IO_PHYSICAL, PAGE, lambda offset, size: offset, lambda *access: written.append(access))
    program = f"mov {IO_VIRTUAL + 0x30}, %ebp\n movl $7, {IO_VIRTUAL + 0xB0}\n int $0x80"
    bench.exception(program)
    assert bench.cpu.read("rbp") == 0x30
    assert written == [(0xB0, 4, 7)]


@pytest.mark.parametrize("other", [NativeCPU, PureCPU], ids=["into-native", "into-pure"])
def test_save_and_load(bench: Bench, other: type[NativeCPU] | type[PureCPU]) -> None:
    """A program saved in ring 3 goes on in another CPU of either kind, descriptors, MSRs and FPU included."""
    program = f"""
        mov $0x12345678, %eax; movd %eax, %xmm3
        {user()}
        mov $0x77, %ebp
    1:  pause
        cmpl $0, {NOTES + 8}; je 1b
        movd %xmm3, %r12d
        ud2
    """
    assert bench.run(program) is Stop.DEADLINE
    state, now = bench.cpu.save(), bench.cpu.now
    bench.replace_cpu(other)
    bench.cpu.load(state)
    bench.cpu.now = now
    assert bench.cpu.read("rbp") == 0x77
    bench.memory.write_u64(NOTES + 8, 1)
    assert bench.run() is Stop.HALTED
    frame = bench.frame()
    assert (frame.vector, frame.cs, frame.ss) == (6, USER_CODE, USER_DATA)
    assert bench.cpu.read("r12") == 0x12345678


def test_state_of_another_version(bench: Bench) -> None:
    with pytest.raises(EmulatorError, match="another Unicorn"):
        bench.cpu.load(b"x" * 100)


def test_two_cpus_take_turns() -> None:
    """Interrupts reach the CPU that runs, whichever was made last."""
    benches = [Bench(make) for make in (NativeCPU, NativeCPU, PureCPU, PureCPU)]
    for number, bench in enumerate(benches):
        bench.load(f"mov ${number}, %ebp\n sti\n 1: jmp 1b")
    for _ in range(2):
        for bench in benches:
            assert bench.run() is Stop.DEADLINE
    for number, bench in enumerate(benches):
        assert bench.run(vector=0x40 + number) is Stop.HALTED
        assert (bench.frame().vector, bench.cpu.read("rbp")) == (0x40 + number, number)
    for bench in benches:
        bench.cpu.close()
        bench.memory.close()
