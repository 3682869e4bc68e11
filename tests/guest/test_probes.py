"""Probes from Python on a stock kernel, and what the kernel's own say about the same things."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from emulator.guest import Guest
from emulator.probes import Context, NoInstruction, NoSymbol, NotAllowed, Probe, ProbeError, Probes
from tests.guest_calls import GETPID, GETPPID, read_file, run_for, trace


@pytest.fixture
def probes(guest: Guest) -> Iterator[Probes]:
    probes = Probes(guest)
    yield probes
    probes.close()


def ticks(guest: Guest) -> None:
    """Let several timer ticks pass; an idle guest has none."""
    for _ in range(20):
        guest.call((GETPID,))
        run_for(guest, 4_000_000)


def text_of(guest: Guest) -> bytes:
    """The kernel's text as it is in RAM."""
    symbols, memory = guest.symbols, guest.machine.memory
    cr3 = guest.machine.cpu.read("cr3")
    return memory.read_virtual(symbols["_stext"], symbols["_etext"] - symbols["_stext"], cr3)


def test_kprobe(guest: Guest, probes: Probes) -> None:
    seen: list[tuple[str, str, int, str]] = []

    def pre(context: Context) -> None:
        seen.append(("pre", context.symbolize(context.regs.rip), *context.task()))

    def post(context: Context) -> None:
        seen.append(("post", context.symbolize(context.regs.rip), *context.task()))

    guest.call((GETPID,))
    before = text_of(guest)
    probe = probes.register_kprobe("__x64_sys_getpid", pre_handler=pre, post_handler=post)
    assert guest.call((GETPID,), (GETPPID,), (GETPID,)) == [1, 0, 1]
    assert [entry[0] for entry in seen] == ["pre", "post"] * 2
    assert seen[0][1:] == ("__do_sys_getpid+0x0", 1, "init")  # one of its names
    assert seen[1][1] != seen[0][1]
    assert probe.hits == 2
    assert text_of(guest) == before

    probe.disable()
    guest.call((GETPID,))
    assert probe.hits == 2
    probe.enable()
    guest.call((GETPID,))
    assert probe.hits == 3
    probe.unregister()
    guest.call((GETPID,))
    assert probe.hits == 3
    with pytest.raises(NotAllowed):
        probe.enable()


def test_every_instruction_of_a_function(guest: Guest, probes: Probes) -> None:
    """A probe on each, with post handlers: each post is where the next pre is, jumps and calls included."""
    symbols = guest.symbols
    start = symbols["vfs_read"]
    made, path = [], []
    for offset in range(0x400):
        found = symbols.at(start + offset)
        if found is None or found[0].name != "vfs_read":
            break
        try:
            made.append(
                probes.register_kprobe(
                    "vfs_read",
                    offset,
                    pre_handler=lambda context: path.append(("pre", context.regs.rip)),
                    post_handler=lambda context: path.append(("post", context.regs.rip)),
                )
            )
        except NoInstruction:
            continue
    assert len(made) > 60
    addresses = {probe.address for probe in made}
    assert read_file(guest, "/proc/version").startswith(b"Linux version")
    assert len(path) > 40
    for (kind, at), (next_kind, next_at) in pairwise(path):
        if kind == "post" and at in addresses:
            assert (next_kind, next_at) == ("pre", at)


def test_several_probes_of_an_address(guest: Guest, probes: Probes) -> None:
    order: list[int] = []

    def handler(number: int) -> Callable[[Context], None]:
        return lambda _: order.append(number)

    made = [probes.register_kprobe("__x64_sys_getpid", pre_handler=handler(number)) for number in range(3)]
    guest.call((GETPID,))
    assert sorted(order) == [0, 1, 2]
    made[1].unregister()
    guest.call((GETPID,))
    assert sorted(order[3:]) == [0, 2]


def test_kretprobe(guest: Guest, probes: Probes) -> None:
    """Results as the kernel's own kretprobe tells them, over a file read in pieces."""
    trace(guest, "kprobe_events", "r:both vfs_read $retval\n")
    trace(guest, "events/kprobes/both/enable", "1")
    returned: list[tuple[int, int]] = []

    def entry(context: Context) -> None:
        context.data = context.argument(2)

    def returns(context: Context) -> None:
        assert isinstance(context.data, int)
        returned.append((context.data, context.return_value))

    probe = probes.register_kretprobe("vfs_read", entry, returns)
    content = read_file(guest, "/proc/meminfo")
    probe.disable()
    trace(guest, "events/kprobes/both/enable", "0")
    assert returned[-1][1] == 0
    assert sum(size for _, size in returned) == len(content)
    assert all(size <= asked for asked, size in returned)
    own = [int(value, 0) for value in re.findall(r"both: .* arg1=(\S+)", trace(guest, "trace"))]
    assert own[: len(returned)] == [size for _, size in returned]
    assert probe.nmissed == 0


def test_kretprobe_follows_tasks_and_recursion(guest: Guest, probes: Probes) -> None:
    """schedule() is left by another task than it was entered by; do_exit() never returns."""
    tasks: list[bool] = []

    def entry(context: Context) -> None:
        context.data = context.task()

    def returns(context: Context) -> None:
        tasks.append(context.data == context.task())

    schedule = probes.register_kretprobe("schedule", entry, returns)
    skipped = probes.register_kretprobe("__x64_sys_getpid", lambda _: True, lambda _: tasks.append(False))
    for _ in range(10):
        guest.call((GETPID,))
        run_for(guest, 5_000_000)  # init goes to sleep
    assert len(tasks) > 5
    assert all(tasks)
    assert skipped.hits == 0
    assert schedule.hits == len(tasks)


def test_kretprobe_maxactive(guest: Guest, probes: Probes) -> None:
    """While init sleeps in its call, the only instance is taken."""
    schedule = probes.register_kretprobe("schedule", maxactive=1)
    for text in ("p:own vfs_open\n", "-:own\n") * 3:
        trace(guest, "kprobe_events", text)  # waits for kernel threads
        run_for(guest, 5_000_000)
    assert schedule.hits > 0
    assert schedule.nmissed > 0


def test_what_the_kernel_refuses(guest: Guest, probes: Probes) -> None:
    symbols = guest.symbols
    refused: list[tuple[type[ProbeError], int, str | int]] = [
        (NoSymbol, errno.ENOENT, "no_such_function"),
        (NotAllowed, errno.EINVAL, "jiffies"),
        (NotAllowed, errno.EINVAL, "exc_int3"),
        (NotAllowed, errno.EINVAL, "entry_SYSCALL_64"),
        (NotAllowed, errno.EINVAL, 0x1000),
        (NoInstruction, errno.EILSEQ, symbols["vfs_read"] + 1),
    ]
    for kind, number, symbol in refused:
        with pytest.raises(kind) as caught:
            probes.register_kprobe(symbol)
        assert caught.value.errno == number
    with pytest.raises(ProbeError):
        probes.register_kretprobe(symbols["vfs_read"] + 4)
    for kind_, length in (("x", 8), ("w", 0), ("w", 1 << 30)):
        with pytest.raises(NotAllowed):
            probes.register_wprobe("jiffies", length, kind_, print)


def test_the_blacklist_is_the_kernels(guest: Guest, probes: Probes) -> None:
    """debugfs lists it; whatever is there is refused."""
    listed = [line.split()[-1] for line in trace_blacklist(guest)]
    assert len(listed) > 100
    for name in listed[:: len(listed) // 50]:
        if name in guest.symbols and len(guest.symbols.find(name)) == 1:
            with pytest.raises(NotAllowed):
                probes.register_kprobe(name)


def trace_blacklist(guest: Guest) -> list[str]:
    """The lines of /sys/kernel/debug/kprobes/blacklist."""
    init = guest.agent.init
    guest.agent.put(init, 0, b"debugfs\0/sys/kernel/debug\0")
    guest.call((165, init.virtual(0), init.virtual(8), init.virtual(0), 0, 0))
    return read_file(guest, "/sys/kernel/debug/kprobes/blacklist").decode().splitlines()


def test_stack_is_what_the_kernel_says(guest: Guest, probes: Probes) -> None:
    """The kernel's own stacktrace trigger on its own kprobe, in the same call."""
    trace(guest, "kprobe_events", "p:own vfs_open\n")
    trace(guest, "events/kprobes/own/trigger", "stacktrace\n")
    stacks: list[list[str]] = []
    probes.register_kprobe("vfs_open", pre_handler=lambda context: stacks.append(context.stack()))
    read_file(guest, "/proc/version")
    output = trace(guest, "trace")
    own = [re.findall(r"^ => (\S+)$", part, re.M) for part in output.split("<stack trace>")[1:]]
    ours = [[line.partition("+")[0] for line in stack] for stack in stacks]
    assert len(own) >= 1
    for kernels, mine in zip(own, ours, strict=False):
        assert mine[0] == "vfs_open"
        assert len(mine) > 4
        assert kernels[-len(mine) + 1 :] == mine[1:]


def test_stack_in_an_interrupt(guest: Guest, probes: Probes) -> None:
    stacks: list[list[str]] = []
    probe = probes.register_kprobe("tick_do_update_jiffies64", 0, lambda context: stacks.append(context.stack()))
    ticks(guest)
    probe.disable()
    names = [[line.partition("+")[0] for line in stack] for stack in stacks]
    assert names
    assert any("asm_sysvec_apic_timer_interrupt" in stack for stack in names)
    assert any("cpu_startup_entry" in stack for stack in names)


def test_wprobe(guest: Guest, probes: Probes) -> None:
    values: list[tuple[int, int, str]] = []

    def handler(context: Context) -> None:
        assert context.hit is not None
        new = int.from_bytes(context.memory(context.hit.watched, 8), "little")
        values.append((context.hit.old, new, context.symbolize(context.regs.rip)))

    probe = probes.register_wprobe("jiffies", 8, "w", handler)
    ticks(guest)
    assert probe.hits == len(values) >= 3
    for (old, new, where), (next_old, _, _) in pairwise(values):
        assert new > old
        assert next_old == new
        assert re.match(r"(do_timer|tick_do_update_jiffies64)\+", where)
    probe.disable()
    hits = probe.hits
    ticks(guest)
    assert probe.hits == hits
    probe.enable()
    ticks(guest)
    assert probe.hits > hits


def test_an_error_in_a_handler(guest: Guest) -> None:
    reports: list[tuple[Probe, str]] = []
    probes = Probes(guest, report=lambda probe, error: reports.append((probe, str(error))))

    def fails(_: Context) -> None:
        raise RuntimeError("broken")

    made: list[Probe] = [
        probes.register_kprobe("__x64_sys_getpid", pre_handler=fails, post_handler=fails),
        probes.register_kretprobe("__x64_sys_getpid", handler=fails),
        probes.register_wprobe("jiffies", 8, "w", fails),
    ]
    assert guest.call((GETPID,), (GETPID,)) == [1, 1]
    ticks(guest)
    assert {probe for probe, _ in reports} == set(made)
    assert len(reports) == 3
    assert not any(probe.enabled for probe in made)
    probes.close()


def test_default_report(guest: Guest, probes: Probes, capsys: pytest.CaptureFixture[str]) -> None:
    probes.register_kprobe("__x64_sys_getpid", pre_handler=lambda context: context.memory(8, 8))
    guest.call((GETPID,))
    assert capsys.readouterr().err.startswith("__x64_sys_getpid: disabled: its handler raised BadAddress: ")


def test_unregister_in_a_handler(guest: Guest, probes: Probes) -> None:
    probe = probes.register_kprobe("__x64_sys_getpid", pre_handler=lambda _: probe.unregister())
    assert guest.call((GETPID,), (GETPID,)) == [1, 1]
    assert probe.hits == 1


def test_a_probe_on_an_instruction_that_hits_a_watchpoint(guest: Guest, probes: Probes) -> None:
    """Such an instruction is begun twice; it is probed once, and both are told."""
    where: list[int] = []

    def handler(context: Context) -> None:
        assert context.hit is not None
        where.append(context.hit.ip)

    wprobe = probes.register_wprobe("jiffies", 8, "w", handler)
    ticks(guest)
    assert where
    post: list[int] = []
    kprobe = probes.register_kprobe(where[0], post_handler=lambda context: post.append(context.regs.rip))
    before = wprobe.hits
    ticks(guest)
    kprobe.disable()
    assert kprobe.hits == len(post) == wprobe.hits - before > 3


def test_probes_where_the_kernel_patches(guest: Guest, probes: Probes) -> None:
    """The machine's own traps of code patching go on, and may be probed."""
    names = ("smp_text_poke_batch_finish", "text_poke_bp_batch")
    name = next(name for name in names if name in guest.symbols)
    probe = probes.register_kprobe(name)
    trace(guest, "kprobe_events", "p:patched vfs_open\n")
    trace(guest, "events/kprobes/patched/enable", "1")
    hits = probe.hits
    assert hits > 0
    probe.unregister()
    read_file(guest, "/proc/version")
    trace(guest, "events/kprobes/patched/enable", "0")
    assert "patched: (vfs_open" in trace(guest, "trace")
    assert probe.hits == hits
