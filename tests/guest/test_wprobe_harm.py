"""What must not do harm: removing wprobes while they are armed, in any order, and watching the hottest memory."""

from __future__ import annotations

import errno
import random
import re
from itertools import permutations

import pytest
import trio

from emulator.guest import Guest
from tests.guest.served import Served, define, make, object_watch, serve, touch, watched

# ---- every way to end

DYNAMIC = b"/sys/kernel/tracing/dynamic_events"
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


# ---- anything at any time

COMMANDS = [
    *(("dynamic_events", f"w{slots}:wprobes/{name} {spec}") for name in "ab" for slots in ("", "2") for spec in
      ("rw@-1:8 v=$value", "w@jiffies:8 o=$old", "w!@init_task:64 n=$size")),
    *(("dynamic_events", line) for line in ("p:te do_truncate dentry=$arg2", "p:tc vfs_open file=$arg2")),
    *(("dynamic_events", f"-:{name}") for name in ("wprobes/a", "wprobes/b", "te", "tc")),
    *((f"{top}events/wprobes/{name}/enable", on) for top in ("", "instances/i/") for name in "ab" for on in "01"),
    *((f"{top}events/kprobes/{event}/trigger", f"{off}{command}")
      for top in ("", "instances/i/") for off in ("", "!") for event, command in (
          ("te", "set_wprobe:a:dentry"), ("te", "set_wprobe:b:dentry:3:timeout=3ms"), ("tc", "clear_wprobe:a"),
          ("te", "clear_wprobe:a:dentry"), ("tc", "set_wprobe:b:file"), ("tc", "clear_wprobe:b:2"),
          ("te", "hist:keys=dentry"))),
    ("instances/i", "mkdir"), ("instances/i", "rmdir"), ("dynamic_events", ""), ("kprobe_events", ""),
    ("events/kprobes/te/trigger", ""), ("error_log", ""),
]  # fmt: skip
EXPECTED = {errno.EBUSY, errno.ENOENT, errno.EEXIST, errno.EINVAL, errno.EPERM}


async def do(tracefs: Served, name: str, text: str) -> None:
    try:
        if text == "mkdir":
            await tracefs.files.mkdir(tracefs.root, b"/sys/kernel/tracing/instances/i", 0o755)
        elif text == "rmdir":
            await tracefs.files.rmdir(tracefs.root, b"/sys/kernel/tracing/instances/i")
        else:
            await tracefs.write(name, text, truncate=not text)
    except OSError as error:
        if error.errno not in EXPECTED:
            raise


async def check(tracefs: Served) -> None:
    """What we know and what the guest has are the same."""
    table = tracefs.table
    carriers = re.findall(r"^p:(\S+) emergency_restart", await tracefs.files.guest_text(DYNAMIC), re.MULTILINE)
    ours = [f"{each.definition.group}/{each.definition.event}" for each in table.wprobes]
    assert sorted(carriers) == sorted(ours)
    shown = await tracefs.read("dynamic_events")
    assert "emergency_restart" not in shown
    for wprobe in table.wprobes:
        assert len(wprobe.slots) <= wprobe.capacity
        assert all((slot.watchpoint is not None) == (wprobe.users > 0) for slot in wprobe.slots)
        attached = [each for each in table.attached if each.target is wprobe]
        assert (wprobe.triggers, wprobe.setters) == (
            len(attached),
            len([each for each in attached if each.trigger.kind == "set"]),
        )


def do_anything(guest: Guest, seed: int, steps: int) -> None:
    async def test(tracefs: Served) -> None:
        chance = random.Random(seed)
        await make(tracefs, "x", "y")
        for _ in range(steps):
            await do(tracefs, *chance.choice(COMMANDS))
            await touch(tracefs, chance.choice("xy"))
            await check(tracefs)
        for top in "instances/i/", "":
            for trigger, pointer in ("te", "dentry"), ("tc", "file"):
                sets = [f"set_wprobe:{name}:{pointer}" for name in "ab"]
                for command in (*sets, "clear_wprobe:a", "clear_wprobe:b", "hist:keys=dentry"):
                    await do(tracefs, f"{top}events/kprobes/{trigger}/trigger", f"!{command}")
        await do(tracefs, "instances/i", "rmdir")
        await do(tracefs, "events/enable", "0")
        await tracefs.write("dynamic_events", "", truncate=True)
        assert not tracefs.table.wprobes
        assert not tracefs.table.attached
        assert (await tracefs.read("/proc/version")).startswith("Linux version")

    serve(guest, test)


@pytest.mark.parametrize("seed", range(2))
def test_anything(guest: Guest, seed: int) -> None:
    do_anything(guest, seed, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_lot_of_anything(guest: Guest, seed: int) -> None:
    do_anything(guest, seed, 300)


def test_many_writers_at_a_time(guest: Guest) -> None:
    """Commands are done one after the other, whoever writes them: of those that define the same, one wins."""

    async def test(tracefs: Served) -> None:
        outcomes: list[str] = []

        async def run(name: str, text: str) -> None:
            try:
                await tracefs.write(name, text)
                outcomes.append("done")
            except OSError as error:
                outcomes.append(errno.errorcode[error.errno or 0])

        async def all_at_once(*commands: tuple[str, str]) -> list[str]:
            outcomes.clear()
            async with trio.open_nursery() as nursery:
                for command in commands:
                    nursery.start_soon(run, *command)
            return sorted(outcomes)

        await define(tracefs, "p:te do_truncate dentry=$arg2")
        assert await all_at_once(*[("dynamic_events", "w4:watch rw@-1:8")] * 5) == ["EBUSY"] * 4 + ["done"]
        trigger = "events/kprobes/te/trigger"
        assert await all_at_once(*[(trigger, "set_wprobe:watch:dentry")] * 5) == ["EEXIST"] * 4 + ["done"]
        await check(tracefs)
        assert await all_at_once(*[(trigger, "!set_wprobe:watch:dentry")] * 5) == ["done"] * 5
        assert await all_at_once(*[("dynamic_events", "-:watch")] * 5) == ["ENOENT"] * 4 + ["done"]
        await check(tracefs)

    serve(guest, test)


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
