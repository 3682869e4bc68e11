"""Interrupts, time, devices and state: both CPUs run the same small programs, and the same is expected of them."""

from __future__ import annotations

import os
import threading

import pytest

from emulator.cpu.interface import Stop
from emulator.cpu.native import NativeCPU
from emulator.cpu.pure import PureCPU
from emulator.cpu.unicorn_cpu import HYPERCALL_LEAF
from emulator.errors import EmulatorError
from emulator.memory import PAGE
from tests.cpu_bench import (
    CODE,
    IF,
    IO_PHYSICAL,
    IO_VIRTUAL,
    KERNEL_CODE,
    NOTES,
    SECOND,
    STACK,
    START,
    STUBS,
    USER_CODE,
    USER_DATA,
    Bench,
    assemble,
    user,
)


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
