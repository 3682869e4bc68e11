"""What must not do harm: removing wprobes while they are armed, in any order, and watching the hottest memory."""

from __future__ import annotations

import errno
import random
import re
from itertools import permutations

import pytest

from emulator.guest import Guest
from tests.guest.served import Served, define, make, object_watch, serve, touch, watched

# ---- every way to end

STEPS = {
    "set": ("events/kprobes/te/trigger", "!set_wprobe:watch:dentry"),
    "clear": ("events/kprobes/tc/trigger", "!clear_wprobe:watch"),
    "disable": ("events/wprobes/watch/enable", "0"),
    "watch": ("dynamic_events", "-:watch"),
    "te": ("dynamic_events", "-:te"),
    "tc": ("dynamic_events", "-:tc"),
}


async def end(tracefs: Served, order: tuple[str, ...]) -> None:
    """Arm a watchpoint, then remove everything in some order; what was busy the first time is free the second."""
    await object_watch(tracefs)
    await tracefs.write("events/kprobes/tc/trigger", "clear_wprobe:watch")
    await touch(tracefs, "armed")
    assert await watched(tracefs) != "-1"
    for name in (*order, *order, "watch", "te", "tc"):
        try:
            await tracefs.write(*STEPS[name])
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise
        await touch(tracefs, "armed")
    assert await tracefs.read("dynamic_events") == "", order
    assert await tracefs.read("/tmp/armed") == ""
    assert not tracefs.table.wprobes
    assert not tracefs.table.attached


def remove_in_orders(guest: Guest, orders: list[tuple[str, ...]]) -> None:
    async def test(tracefs: Served) -> None:
        await make(tracefs, "armed")
        for order in orders:
            await end(tracefs, order)

    serve(guest, test)


ORDERS = list(permutations(STEPS))


def test_removal_in_some_orders(guest: Guest) -> None:
    remove_in_orders(guest, random.Random(1).sample(ORDERS, 12))


@pytest.mark.slow
def test_removal_in_every_order(guest: Guest) -> None:
    assert len(ORDERS) == 720
    remove_in_orders(guest, ORDERS)


# ---- where a hit is hardest to take


def hot_places(guest: Guest) -> dict[str, int]:
    """What entry code, interrupts and the handling of a hit itself use all the time."""
    machine, symbols, btf, word = guest.machine, guest.symbols, guest.btf, (1 << 64) - 1
    per_cpu = max(machine.cpu.read("gs_base"), machine.cpu.read("kernel_gs_base"))
    facts = guest.agent.facts
    assert facts is not None
    stack_at = guest.agent.init.task_struct + btf.offsetof("task_struct", "stack")
    stack = int.from_bytes(machine.memory.read_virtual(stack_at, 8, machine.cpu.read("cr3")), "little")
    return {
        "the current task": facts.current_task + per_cpu & word,
        "its flags": guest.agent.init.task_struct,
        "its stack, where user registers are": stack + 0x4000 - 168 & word,
        "its stack, deeper": stack + 0x4000 - 512 & word,
        "interrupts' count": symbols["irq_stat"] + per_cpu & word,
        "dynamic events": symbols["dyn_event_list"],
        "the tick": symbols["jiffies"],
    }


def test_hot_places(guest: Guest) -> None:
    """Stacks, per-CPU data, the gap behind SYSCALL, interrupts, what the handler reads: hits, and the guest lives."""

    async def test(tracefs: Served) -> None:
        places = hot_places(guest)
        for number, (place, address) in enumerate(places.items()):
            await define(tracefs, f"w:hot{number} rw@{address:#x}:{64 if 'stack' in place else 8} n=$size")
        await tracefs.write("events/wprobes/enable", "1")
        for _ in range(10):
            assert (await tracefs.read("/proc/version")).startswith("Linux version")
            await tracefs.read("dynamic_events")
            guest.machine.cpu.now += 4_000_000
        await tracefs.write("events/wprobes/enable", "0")
        trace = await tracefs.read("trace")
        for number, place in enumerate(places):
            assert f" hot{number}: (" in trace, place
        inside = [line for line in trace.splitlines() if re.search(r"hot\d: \((kprobe_|exc_debug|notify_die)", line)]
        assert not inside
        await tracefs.write("dynamic_events", "", truncate=True)
        assert (await tracefs.read("/proc/version")).startswith("Linux version")

    serve(guest, test)
