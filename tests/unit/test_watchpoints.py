"""Watchpoints on a bare CPU: which accesses hit which ranges, and what is reported of them.

The programs run in ring 0 on the bench of cpu_bench.py; a debug exception of the guest's ends them in its stub.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emulator.cpu.interface import Stop
from emulator.cpu.native import NativeCPU
from emulator.cpu.watchpoints import Access, Hit, Kind, Watchpoints
from emulator.errors import EmulatorError
from emulator.memory import PAGE
from tests.cpu_bench import ABSENT, CODE, PT, STACK, STUBS, Bench

DATA = 0x60000  # two pages nothing else uses
R, W, RW = Access.READ, Access.WRITE, Access.READ | Access.WRITE
END = "\n 1: pause\n jmp 1b"


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(NativeCPU)
    yield bench
    bench.cpu.close()
    bench.memory.close()


def watchpoints(bench: Bench) -> Watchpoints:
    assert isinstance(bench.cpu, NativeCPU)
    assert bench.cpu.watchpoints is not None, bench.cpu.no_watchpoints
    return bench.cpu.watchpoints


def hits_of(bench: Bench, program: str, ns: int = 20_000) -> list[Hit]:
    """Run a program for some virtual time and return all hits, in order."""
    bench.load(program + END)
    return go_on(bench, ns)


def go_on(bench: Bench, ns: int = 20_000) -> list[Hit]:
    hits: list[Hit] = []
    deadline = bench.cpu.now + ns
    while (stop := bench.cpu.run(deadline)) is Stop.WATCH:
        hits += watchpoints(bench).take_hits()
    assert stop is Stop.DEADLINE
    return hits


def test_what_is_reported(bench: Bench) -> None:
    bench.memory.write_u64(DATA, 0x1122334455667788)
    watchpoints(bench).add(DATA, 8, W, Kind.STOP, token=77)
    [hit] = hits_of(bench, f"movl $5, {DATA + 4}\n lea (%rip), %rbx")
    assert hit == Hit(77, DATA + 4, 4, hit.ip, hit.next_ip, DATA, 0x1122334455667788, W)
    assert hit.next_ip - hit.ip == 11
    assert bench.memory.read_u64(DATA) == 0x0000000555667788


def test_stops_behind_the_instruction(bench: Bench) -> None:
    watchpoints(bench).add(DATA, 1, RW, Kind.STOP)
    bench.load(f"mov $7, %ecx\n mov %cl, {DATA}\n mov $9, %ecx" + END)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
    [hit] = watchpoints(bench).take_hits()
    assert bench.cpu.read("rip") == hit.next_ip
    assert bench.cpu.read("rcx") == 7
    assert bench.memory.read(DATA, 1) == b"\x07"


@pytest.mark.parametrize(
    ("program", "access", "count"),
    [
        (f"mov {DATA}, %rax", R, 1),
        (f"mov {DATA}, %rax", W, 0),
        (f"mov %rax, {DATA}", R, 0),
        (f"incq {DATA}", RW, 1),
        (f"incq {DATA}", W, 1),
        (f"lock incq {DATA}", W, 1),
        (f"xchg %rax, {DATA}", RW, 1),
        (f"xor %eax, %eax\n lock cmpxchg %rcx, {DATA}", RW, 1),
        (f"lock cmpxchg16b {DATA}", R, 1),
        (f"push $1\n pop {DATA}", W, 1),
        (f"push {DATA}", R, 1),
        (f"mov ${DATA + 8}, %rsp\n push $1\n mov ${STACK}, %rsp", W, 1),
        (f"mov ${DATA}, %rsp\n pop %rax\n mov ${STACK}, %rsp", R, 1),
        (f"mov ${DATA - 4}, %edi\n mov $16, %ecx\n rep stosb", W, 8),
        (f"mov ${DATA}, %esi\n mov ${DATA + 64}, %edi\n mov $8, %ecx\n rep movsb", R, 8),
        (f"mov ${DATA + 64}, %esi\n mov ${DATA}, %edi\n mov $2, %ecx\n rep movsl", W, 2),
        (f"mov %rax, {DATA - 4}", W, 1),
        (f"mov %rax, {DATA + 7}", W, 1),
        (f"mov %rax, {DATA - 8}\n mov %rax, {DATA + 8}", W, 0),
        (f"movups %xmm0, {DATA - 8}", W, 1),
        (f"movups {DATA - 15}, %xmm0", R, 1),
        (f"fxsave {DATA - 0x100}", W, 1),
        (f"sidt {DATA}", W, 1),
    ],
)
def test_instructions(bench: Bench, program: str, access: Access, count: int) -> None:
    watchpoints(bench).add(DATA, 8, access, Kind.STOP)
    hits = hits_of(bench, program)
    assert len(hits) == count
    assert all(hit.access & access for hit in hits)


@pytest.mark.parametrize("offset", range(1, 8))
def test_neighbours_of_an_unaligned_load(bench: Bench, offset: int) -> None:
    """The engine makes two aligned loads of it; what is beside it must not be hit."""
    watch = watchpoints(bench)
    watch.add(DATA + offset - 1, 1, RW, Kind.STOP, 1)
    watch.add(DATA + offset, 1, RW, Kind.STOP, 2)
    watch.add(DATA + offset + 7, 1, RW, Kind.STOP, 3)
    watch.add(DATA + offset + 8, 1, RW, Kind.STOP, 4)
    hits = hits_of(bench, f"mov ${DATA}, %ebx\n mov {offset}(%rbx), %rax")
    assert [(hit.token, hit.address, hit.length) for hit in hits] == [
        (2, DATA + offset, 8), (3, DATA + offset, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "load",
    [
        "mov 3(%rbx), %eax",
        "mov %gs:3(%rbx), %eax",
        "lock xadd %eax, 3(%rbx)",
        "cmpl $77777, 3(%rbx)",
        "movzwl 1(%rbx,%rcx,2), %edx",
        "add -1(%rbx,%r9), %r15d",
        f"testl $77777, .text + {DATA + 3 - CODE}(%rip)",  # an immediate behind the displacement
        "movss 3(%ebx), %xmm1",
        "imul $1000, 3(%rbx), %eax",
    ],
)
def test_operands_of_unaligned_loads(bench: Bench, load: str) -> None:
    """All of them load from DATA + 3 or a little above, in one or another way of saying so."""
    watch = watchpoints(bench)
    watch.add(DATA + 2, 1, R, Kind.STOP, 1)
    watch.add(DATA + 3, 1, R, Kind.STOP, 2)
    watch.add(DATA + 7, 1, R, Kind.STOP, 3)
    hits = hits_of(bench, f"mov ${DATA}, %ebx\n mov $1, %ecx\n mov $4, %r9d\n {load}")
    assert [hit.token for hit in hits] == [2]


def test_page_straddling(bench: Bench) -> None:
    watch = watchpoints(bench)
    watch.add(DATA + PAGE - 1, 1, RW, Kind.STOP, 1)
    watch.add(DATA + PAGE, 1, RW, Kind.STOP, 2)
    hits = hits_of(bench, f"mov %rax, {DATA + PAGE - 4}\n mov {DATA + PAGE - 4}, %eax\n mov {DATA + PAGE - 1}, %ax")
    assert [(hit.token, hit.access) for hit in hits] == [(1, W), (2, W), (1, R), (1, R), (2, R)]


def test_one_instruction_several_watchpoints(bench: Bench) -> None:
    watch = watchpoints(bench)
    for number in range(10):
        watch.add(DATA + number % 4, 1 + number, RW, Kind.STOP, number)
    hits = hits_of(bench, f"mov %eax, {DATA}")
    assert [hit.token for hit in hits] == list(range(10))
    assert len({hit.ip for hit in hits}) == 1


def test_however_many_an_instruction_hits(bench: Bench) -> None:
    """Overlapping ranges, some across a page boundary: each reports, once, in the order of their numbers."""
    watch = watchpoints(bench)
    base = DATA + PAGE - 4
    for number in range(500):
        watch.add(base - number % 50, 60, W, Kind.STOP, number)
    hits = hits_of(bench, f"movq $1, {base}")
    assert [hit.token for hit in hits] == list(range(500))
    assert {(hit.address, hit.length, hit.access) for hit in hits} == {(base, 8, W)}


def test_the_value_before(bench: Bench) -> None:
    """Of a variable from its start, of more than 8 bytes from the first one accessed."""
    watch = watchpoints(bench)
    for number in range(16):
        bench.memory.write_u64(DATA + 8 * number, 0x1000 + number)
    watch.add(DATA, 8, W, Kind.STOP, 1)
    watch.add(DATA + 8, 100, RW, Kind.STOP, 2)
    program = f"movl $5, {DATA + 4}\n movl $6, {DATA + 32}\n movq $7, {DATA + 4}\n mov {DATA + 36}, %eax"
    assert [(hit.token, hit.address, hit.old) for hit in hits_of(bench, program)] == [
        (1, DATA + 4, 0x1000),
        (2, DATA + 32, 0x1004),
        (1, DATA + 4, 0x500001000),
        (2, DATA + 4, 0x1001),  # from the range's first byte on
        (2, DATA + 36, 0x100500000000),
    ]


@pytest.mark.parametrize("length", [1, 8, 300])
def test_only_changes(bench: Bench, length: int) -> None:
    watch = watchpoints(bench)
    watch.add(DATA + PAGE - 1, length, W | Access.CHANGE, Kind.STOP)
    at = DATA + PAGE - 1
    program = f"movb $1, {at}\n movb $1, {at}\n mov {at}, %al\n movb $2, {at}\n movw $0x0102, {at - 1}\n decb {at}"
    hits = hits_of(bench, program + f"\n lock xaddb %dl, {at}\n movl $0, {at - 4}")
    assert [hit.old & 0xFF for hit in hits] == [0, 1, 2, 1]


def test_a_change_and_a_write(bench: Bench) -> None:
    watch = watchpoints(bench)
    watch.add(DATA, 8, W | Access.CHANGE, Kind.STOP, 1)
    watch.add(DATA, 8, W, Kind.STOP, 2)
    hits = hits_of(bench, f"movq $3, {DATA}\n movq $3, {DATA}\n movq $4, {DATA}")
    assert [hit.token for hit in hits] == [1, 2, 2, 1, 2]


def test_source_and_destination(bench: Bench) -> None:
    watch = watchpoints(bench)
    watch.add(DATA, 8, R, Kind.STOP, 1)
    watch.add(DATA + 64, 8, W, Kind.STOP, 2)
    hits = hits_of(bench, f"mov ${DATA}, %esi\n mov ${DATA + 64}, %edi\n movsq")
    assert [(hit.token, hit.ip) for hit in hits] == [(1, hits[0].ip), (2, hits[0].ip)]


def test_move_and_remove(bench: Bench) -> None:
    watch = watchpoints(bench)
    number = watch.add(DATA, 8, W, Kind.STOP, 5)
    program = f"2: incq {DATA}\n incq {DATA + 64}\n jmp 2b"
    bench.load(program)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
    watch.move(number, DATA + 64)
    assert [hit.watched for hit in watch.take_hits()] == [DATA]
    for _ in range(3):
        assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
        assert [hit.watched for hit in watch.take_hits()] == [DATA + 64]
    watch.remove(number)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.DEADLINE
    for gone in (number, -1, 1 << 20):
        with pytest.raises(EmulatorError):
            watch.remove(gone)
        with pytest.raises(EmulatorError):
            watch.move(gone, DATA)


def test_bad_ranges(bench: Bench) -> None:
    watch = watchpoints(bench)
    for address, length, access in ((DATA, 0, RW), (DATA, 1 << 21, RW), ((1 << 64) - 4, 8, RW), (DATA, 8, Access(0))):
        with pytest.raises(EmulatorError):
            watch.add(address, length, access, Kind.STOP)


def test_an_exception_drops_the_hit(bench: Bench) -> None:
    """PUSH of a watched word to a stack that is not there: the read is not reported, as the push did not happen."""
    watchpoints(bench).add(DATA, 8, R, Kind.STOP)
    bench.gate(14, ist=1)
    bench.load(f"mov ${ABSENT + 8}, %rsp\n push {DATA}" + END)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.HALTED
    assert bench.frame().vector == 14
    assert watchpoints(bench).take_hits() == []
    # The page comes, the handler returns, and now it happens.
    bench.memory.write_u64(PT + ABSENT // PAGE * 8, ABSENT | 7)
    bench.cpu.flush_translations()
    bench.cpu.write("rip", bench.frame().rip)
    bench.cpu.write("rsp", ABSENT + 8)
    assert len(go_on(bench)) == 1


def test_a_page_mapped_later(bench: Bench) -> None:
    watchpoints(bench).add(ABSENT + 16, 8, W, Kind.STOP)
    bench.memory.write_u64(PT + ABSENT // PAGE * 8, ABSENT | 7)
    [hit] = hits_of(bench, f"movq $1, {ABSENT + 16}")
    assert hit.watched == ABSENT + 16


def test_interrupts_wait_for_the_hit(bench: Bench) -> None:
    """An interrupt that is due during the instruction comes behind the report."""
    watchpoints(bench).add(DATA, 8, W, Kind.STOP)
    bench.load(f"sti\n 2: incq {DATA}\n jmp 2b")
    for _ in range(5):
        assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
        assert len(watchpoints(bench).take_hits()) == 1
    assert bench.cpu.run(bench.cpu.now + 20_000, vector=0x40) is Stop.HALTED
    assert bench.frame().vector == 0x40


DR = f"mov ${DATA}, %eax\n mov %rax, %dr0\n mov ${DATA + 8}, %eax\n mov %rax, %dr1\n"


@pytest.mark.parametrize(
    ("dr7", "access", "dr6"),
    [
        (0x000D0001, f"mov %ebx, {DATA}", 1),  # DR0, 4 bytes, writes
        (0x000D0001, f"mov {DATA}, %ebx", 0),
        (0x000F0001, f"mov {DATA}, %ebx", 1),  # and reads
        (0x00D90005, f"mov %ebx, {DATA + 8}", 2),
        (0x00D90005, f"movups %xmm0, {DATA}", 3),
        (0x00D90004, f"movups %xmm0, {DATA}", 2),
        (0x00090001, f"mov %bl, {DATA + 7}", 1),  # 8 bytes
    ],
)
def test_debug_registers(bench: Bench, dr7: int, access: str, dr6: int) -> None:
    bench.load(f"{DR} mov ${dr7}, %eax\n mov %rax, %dr7\n {access}\n lea (%rip), %rbp" + END)
    stop = bench.cpu.run(bench.cpu.now + 20_000)
    if not dr6:
        assert stop is Stop.DEADLINE
        return
    assert stop is Stop.HALTED
    frame = bench.frame()
    assert frame.vector == 1
    assert bench.cpu.read("dr6") & 0xF == dr6
    assert bench.cpu.read("rbp") == 0
    assert frame.rip > CODE


def test_debug_register_and_host(bench: Bench) -> None:
    """Both are told of one access: the host first, then the guest."""
    watchpoints(bench).add(DATA, 8, W, Kind.STOP)
    bench.load(f"{DR} mov $0x000d0001, %eax\n mov %rax, %dr7\n mov %eax, {DATA}" + END)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
    assert len(watchpoints(bench).take_hits()) == 1
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.HALTED
    assert bench.frame().vector == 1


def test_a_trap_on_an_instruction_that_hits(bench: Bench) -> None:
    watchpoints(bench).add(DATA, 8, W, Kind.STOP)
    bench.load(f"2: incq {DATA}\n pause\n jmp 2b")
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
    [hit] = watchpoints(bench).take_hits()
    bench.cpu.add_trap(hit.ip)
    bench.cpu.forget_code(hit.ip, hit.ip + 1)
    for _ in range(3):
        assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.TRAP
        bench.cpu.pass_trap()
        assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH
        assert [again.ip for again in watchpoints(bench).take_hits()] == [hit.ip]
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.TRAP
    assert bench.cpu.step() is Stop.WATCH
    assert bench.cpu.read("rip") == hit.next_ip
    bench.cpu.remove_trap(hit.ip)
    assert bench.cpu.run(bench.cpu.now + 20_000) is Stop.WATCH


def test_step(bench: Bench) -> None:
    bench.load("mov $1, %eax\n mov $2, %eax\n ud2" + END)
    where = []
    while bench.cpu.step() is Stop.DEADLINE:
        where.append(bench.cpu.read("rip"))
    assert where == sorted(set(where))
    assert bench.cpu.read("rax") == 2
    assert bench.cpu.read("rip") == STUBS + 16 * 6


class Range(NamedTuple):
    start: int
    length: int
    access: Access


RANGES = st.builds(Range, st.integers(0, 140), st.integers(1, 20), st.sampled_from((R, W, RW)))
ACCESSES = st.tuples(st.integers(0, 140), st.sampled_from((1, 2, 4, 8)), st.booleans())
BOUNDARY = 70
"""The offset of a page's end among those of the ranges and accesses."""
MOVES = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranges=st.lists(RANGES, min_size=1, max_size=12),
    removed=st.sets(st.integers(0, 11)),
    accesses=st.lists(ACCESSES, min_size=1, max_size=10),
)
@example(ranges=[Range(44, 20, W)], removed=set(), accesses=[(63, 8, True)])
def test_against_a_model(
    bench: Bench, ranges: list[Range], removed: set[int], accesses: list[tuple[int, int, bool]]
) -> None:
    """Overlapping ranges across a page boundary, some removed; exactly the accesses that overlap them hit."""
    base = DATA + PAGE - BOUNDARY
    watch = watchpoints(bench)
    numbers = [
        watch.add(base + start, length, access, Kind.STOP, token)
        for token, (start, length, access) in enumerate(ranges)
    ]
    for token in removed & set(range(len(ranges))):
        watch.remove(numbers[token])
    live = {token: r for token, r in enumerate(ranges) if token not in removed}
    program, expected = [f"mov ${base}, %ebx"], []
    for offset, size, is_write in accesses:
        operands = f"{MOVES[size]}, {offset}(%rbx)" if is_write else f"{offset}(%rbx), {MOVES[size]}"
        program.append(f"mov {operands}")
        done = W if is_write else R
        # A store across the boundary is two; a watchpoint is told of those it overlaps.
        cut = BOUNDARY if is_write and offset < BOUNDARY < offset + size else offset + size
        pieces = [(start, end) for start, end in ((offset, cut), (cut, offset + size)) if start < end]
        for token, r in live.items():
            seen = [(start, end) for start, end in pieces if r.start < end and start < r.start + r.length]
            if r.access & done and seen:
                expected.append((token, base + seen[0][0], seen[-1][1] - seen[0][0], done))
    hits = hits_of(bench, "\n".join(program))
    for token in live:
        watch.remove(numbers[token])
    found = [(hit.token, hit.address, hit.length, hit.access) for hit in hits]
    by_ip: dict[int, list[tuple[int, int, int, Access]]] = {}
    for hit, entry in zip(hits, found, strict=True):
        by_ip.setdefault(hit.ip, []).append(entry)
    # Hits of one instruction come in the order of their numbers, which those of removed ones are given anew.
    assert [entry for entries in by_ip.values() for entry in sorted(entries)] == expected
