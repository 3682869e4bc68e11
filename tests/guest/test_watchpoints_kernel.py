"""Watchpoints on a stock kernel: the guest's own debug registers, and the host's watchpoints on its hot spots."""

from __future__ import annotations

import re
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest

from emulator.agent import SLOT_CALLS, SLOT_DATA
from emulator.cpu.native import NativeCPU
from emulator.cpu.watchpoints import Access, Hit, Kind, Watchpoints
from emulator.guest import Guest
from tests.guest_calls import GETPID, compile_static, read_file, run_for, run_program

R, W, RW = Access.READ, Access.WRITE, Access.READ | Access.WRITE

PERF = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>
#include <linux/perf_event.h>
#include <linux/hw_breakpoint.h>

static volatile unsigned char memory[128] __attribute__((aligned(64)));

static int watch(int offset, int length, int type)
{
    struct perf_event_attr attr = { .type = PERF_TYPE_BREAKPOINT, .size = sizeof(attr), .bp_type = type,
        .bp_addr = (unsigned long)(memory + offset), .bp_len = length, .sample_period = 1, .exclude_kernel = 1 };

    return syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
}

static void tell(const char *what, int fd)
{
    long count = -1;

    read(fd, &count, 8);
    close(fd);
    printf("%s %ld\n", what, count);
}

int main(void)
{
    char name[16];
    int fd, fds[4];

    for (int length = 1; length <= 8; length *= 2) {
        fd = watch(8, length, HW_BREAKPOINT_W);
        for (int i = 0; i < 24; i++)
            memory[i] = i;
        (void)memory[8];
        sprintf(name, "w%d", length);
        tell(name, fd);
        fd = watch(8, length, HW_BREAKPOINT_RW);
        for (int i = 0; i < 24; i++)
            memory[i]++;
        (void)memory[8];
        (void)memory[8 + length];
        sprintf(name, "rw%d", length);
        tell(name, fd);
    }
    fd = watch(8, 8, HW_BREAKPOINT_W);
    void *to = (void *)memory, *from = (void *)(memory + 64);
    long count = 32;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    tell("rep", fd);
    fd = watch(8, 8, HW_BREAKPOINT_W);
    asm volatile("lock incq %0" : "+m"(*(volatile long *)(memory + 8)));
    tell("lock", fd);
    fd = watch(8, 8, HW_BREAKPOINT_W);
    asm volatile("push $1; pop %0" : "=m"(*(volatile long *)(memory + 8)));
    tell("pop", fd);
    fd = watch(8, 8, HW_BREAKPOINT_RW);
    *(volatile long *)(memory + 5) = 7;
    (void)*(volatile long *)(memory + 11);
    (void)*(volatile int *)(memory + 5);
    (void)*(volatile int *)(memory + 17);
    tell("unaligned", fd);
    for (int i = 0; i < 4; i++)
        fds[i] = watch(8 + 2 * i, 2, HW_BREAKPOINT_W);
    *(volatile long *)(memory + 8) = 1;
    for (int i = 0; i < 4; i++)
        tell("four", fds[i]);
    return 0;
}
"""

PTRACE = r"""
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

static volatile long first, second, third;
#define REGISTER(n) offsetof(struct user, u_debugreg[n])

int main(void)
{
    int status, child = fork();

    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        first = 1;
        third = 1;
        second = 2;
        first = 3;
        _exit(0);
    }
    waitpid(child, &status, 0);
    if (ptrace(PTRACE_POKEUSER, child, REGISTER(0), &first) || ptrace(PTRACE_POKEUSER, child, REGISTER(1), &second) ||
        ptrace(PTRACE_POKEUSER, child, REGISTER(7), 1 | 4 | (9L << 16) | (9L << 20)))
        printf("refused\n");
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        if (WIFEXITED(status))
            break;
        printf("%d %lx %ld %ld\n", WSTOPSIG(status), ptrace(PTRACE_PEEKUSER, child, REGISTER(6), 0) & 15,
               ptrace(PTRACE_PEEKDATA, child, &first, 0), ptrace(PTRACE_PEEKDATA, child, &second, 0));
        ptrace(PTRACE_POKEUSER, child, REGISTER(6), 0);
    }
    printf("exit %d\n", WEXITSTATUS(status));
    return 0;
}
"""

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


def watchpoints(guest: Guest) -> Watchpoints:
    cpu = guest.machine.cpu
    assert isinstance(cpu, NativeCPU)
    assert cpu.watchpoints is not None, cpu.no_watchpoints
    return cpu.watchpoints


@pytest.fixture
def hits(guest: Guest) -> list[Hit]:
    """What the host's watchpoints are hit by, as it happens."""
    hits: list[Hit] = []
    watch = watchpoints(guest)
    guest.machine.on_watch = lambda: hits.extend(watch.take_hits())
    return hits


def work(guest: Guest, rounds: int = 20) -> None:
    """Give the guest something to do: system calls, sleep, timer ticks."""
    for _ in range(rounds):
        guest.call((GETPID,))
        run_for(guest, 4_000_000)


def per_cpu(guest: Guest) -> int:
    cpu = guest.machine.cpu
    return next(base for base in (cpu.read("gs_base"), cpu.read("kernel_gs_base")) if base >> 63)


@needs_compiler
def test_perf_counts_exactly(guest: Guest, tmp_path: Path) -> None:
    status, output = run_program(guest, compile_static(PERF, tmp_path))
    assert status == 0
    counts = [line.rsplit(maxsplit=1) for line in output.splitlines()]
    expected = {"rep": 8, "lock": 1, "pop": 1, "unaligned": 3, "four": 1}
    expected |= {f"w{length}": length for length in (1, 2, 4, 8)}
    # Each memory[i]++ is one instruction or a load and a store, as the compiler likes.
    single = {f"rw{length}": length + 1 for length in (1, 2, 4, 8)}
    double = {f"rw{length}": 2 * length + 1 for length in (1, 2, 4, 8)}
    found = {name: int(count) for name, count in counts}
    assert found in (expected | single, expected | double)
    assert output.count("four 1") == 4


@needs_compiler
def test_ptrace_debug_registers(guest: Guest, tmp_path: Path) -> None:
    status, output = run_program(guest, compile_static(PTRACE, tmp_path))
    assert status == 0
    assert output.splitlines() == ["5 1 1 0", "5 2 1 2", "5 1 3 2", "exit 0"]


def test_jiffies(guest: Guest, hits: list[Hit]) -> None:
    """Written in interrupt handlers, read everywhere."""
    number = watchpoints(guest).add(guest.symbols["jiffies"], 8, W, Kind.STOP, 7)
    work(guest)
    assert len(hits) > 10
    for hit, following in pairwise(hits):
        assert (hit.token, hit.access) == (7, W)
        assert hit.old < following.old
        assert re.match(r"(do_timer|tick_do_update_jiffies64)\+", guest.symbols.symbolize(hit.ip))
        assert 0 < hit.next_ip - hit.ip < 16
    watchpoints(guest).remove(number)
    seen = len(hits)
    work(guest, 5)
    assert len(hits) == seen


def test_a_task_stack(guest: Guest, hits: list[Hit]) -> None:
    """The deep end of init's kernel stack: pushes, pops, calls, entry from user mode and exception frames."""
    watch, btf, agent = watchpoints(guest), guest.btf, guest.agent
    memory, cr3 = guest.machine.memory, guest.machine.cpu.read("cr3")
    at = agent.init.task_struct + btf.offsetof("task_struct", "stack")
    stack = int.from_bytes(memory.read_virtual(at, 8, cr3), "little")
    watch.add(stack + 0x4000 - 512, 512, RW, Kind.STOP)
    assert guest.call((GETPID,), (GETPID,)) == [1, 1]
    assert read_file(guest, "/proc/version").startswith(b"Linux")
    work(guest, 3)
    places = {guest.symbols.symbolize(hit.ip).partition("+")[0] for hit in hits}
    assert len(hits) > 200
    assert any(place.startswith("entry_SYSCALL_64") for place in places)


def test_per_cpu_variables(guest: Guest, hits: list[Hit]) -> None:
    """The running task and preempt count: touched in every entry, interrupts and the scheduler."""
    facts = guest.agent.facts
    assert facts is not None
    names = [name for name in ("pcpu_hot", "__preempt_count") if name in guest.symbols]
    watch = watchpoints(guest)
    base = per_cpu(guest)
    current = facts.current_task + base & (1 << 64) - 1
    watch.add(current, 8, W, Kind.STOP, 1)
    if names:
        watch.add(guest.symbols[names[0]] + base & (1 << 64) - 1, 16, RW, Kind.STOP, 2)
    work(guest, 5)
    switches = [hit for hit in hits if hit.token == 1]
    assert switches
    assert {guest.symbols.symbolize(hit.ip).partition("+")[0] for hit in switches} == {"__switch_to"}
    assert not names or len(hits) > 100
    assert guest.call((GETPID,)) == [1]


def test_the_system_call_gap(guest: Guest, hits: list[Hit]) -> None:
    """Between SYSCALL and the switch of stacks the kernel runs on the user's: cpu_tss_rw.sp2 is written there."""
    watch = watchpoints(guest)
    sp2 = guest.symbols["cpu_tss_rw"] + per_cpu(guest) + guest.btf.offsetof("tss_struct", "x86_tss.sp2")
    watch.add(sp2 & (1 << 64) - 1, 8, RW, Kind.STOP)
    assert guest.call(*[(GETPID,)] * 10) == [1] * 10
    places = [guest.symbols.symbolize(hit.ip) for hit in hits]
    assert len(places) >= 10
    assert all(place.startswith("entry_SYSCALL") for place in places)


def test_a_thousand_watchpoints(guest: Guest, hits: list[Hit]) -> None:
    """Armed on a page in constant use, and not hit."""
    watch = watchpoints(guest)

    def measure() -> float:
        begin = time.process_time()
        for _ in range(30):
            guest.call(*[(GETPID,)] * 100)
        return time.process_time() - begin

    measure()
    without = min(measure() for _ in range(3))
    # Behind the 100 calls, on the page init reads half of them from and writes their results to.
    free = guest.agent.init.virtual() - SLOT_DATA + SLOT_CALLS + 101 * 64
    numbers = [watch.add(free + number, 1, RW, Kind.STOP) for number in range(1000)]
    measure()
    armed = min(measure() for _ in range(3))
    print(f"3000 system calls: {without * 1e3:.1f} ms, with 1,000 watchpoints {armed * 1e3:.1f} ms")
    assert not hits
    assert armed < 2 * without + 0.01
    for number in numbers:
        watch.remove(number)


def test_user_memory_written_by_the_kernel(guest: Guest, hits: list[Hit]) -> None:
    """copy_to_user() to a watched byte of a buffer, in the middle of a long copy."""
    init = guest.agent.init
    watchpoints(guest).add(init.virtual(0x400 + 5), 1, W, Kind.STOP)
    content = read_file(guest, "/proc/version")
    assert hits
    assert content.startswith(b"Linux version")
