"""Exceptions and SYSCALL: both CPUs run the same small 64-bit programs (Intel SDM vol. 3, chapters 4 to 6)."""

from __future__ import annotations

import pytest

from emulator.cpu.interface import GuestDied
from tests.cpu_bench import (
    ABSENT,
    IF,
    IST1,
    KERNEL_CODE,
    KERNEL_DATA,
    NOTES,
    READ_ONLY,
    RSP0,
    STACK,
    STUBS,
    SUPERVISOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    Bench,
    assemble,
    user,
)


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
