"""wprobes on a stock kernel by their files: what is accepted beyond the series, what is refused, what is not seen."""

from __future__ import annotations

import pytest

from emulator.guest import Guest
from emulator.memory import PAGE
from tests.guest.served import Served, define, hits, make, object_watch, serve, touch, watched

PANIC = "/proc/sys/kernel/panic"  # the variable panic_timeout


# ---- arguments


def test_old_size_and_access(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        line = "w:wprobes/p rw@panic_timeout:4 old=$old:u32 new=$value:u32 n=$size how=$access at=$at"
        await define(tracefs, line)
        assert await tracefs.read("dynamic_events") == line + "\n"
        await tracefs.enable("wprobes/p")
        await tracefs.write(PANIC, "7")
        await tracefs.write(PANIC, "9")
        assert await tracefs.read(PANIC) == "9\n"
        await tracefs.enable("wprobes/p", False)
        at = f"{guest.symbols['panic_timeout']:#x}"
        records = await hits(tracefs, "p")
        writes = [record for record in records if record["how"] == '"w"']
        assert [(record["old"], record["new"]) for record in writes] == [("4294967295", "7"), ("7", "9")]
        assert {(record["at"], record["n"]) for record in records} == {(at, "4")}
        assert {record["how"] for record in records} == {'"w"', '"r"'}
        assert [record["new"] for record in records if record["how"] == '"r"'][-1] == "9"

    serve(guest, test)


def test_an_area(guest: Guest) -> None:
    """A name of some bytes inside a structure of hundreds, at an odd address: where and what."""

    async def test(tracefs: Served) -> None:
        name = guest.btf.offsetof("uts_namespace", "name.nodename")
        line = "w:wprobes/area w@init_uts_ns+1:395 at=$at new=+0($at):u8 old=$old:u8"
        await define(tracefs, line)
        assert await tracefs.read("dynamic_events") == line + "\n"
        await tracefs.enable("wprobes/area")
        await tracefs.write("/proc/sys/kernel/hostname", "abc")
        await tracefs.enable("wprobes/area", False)
        records = await hits(tracefs, "area")
        start = guest.symbols["init_uts_ns"] + name
        first = next(record for record in records if int(record["at"], 16) == start)
        assert first["new"] == str(ord("a"))
        assert all(start <= int(record["at"], 16) < start + 65 for record in records)

    serve(guest, test)


def test_filters_by_the_access(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await define(tracefs, "w:w rw@panic_timeout:4 how=$access n=$size")
        await tracefs.write("events/wprobes/w/filter", 'how == "w" && n == 4')
        await tracefs.enable("wprobes/w")
        await tracefs.write(PANIC, "7")
        await tracefs.read(PANIC)
        await tracefs.enable("wprobes/w", False)
        assert await hits(tracefs, "w") == [{"how": '"w"', "n": "4"}]

    serve(guest, test)


def test_reads_alone(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await define(tracefs, "w:r r@panic_timeout:4 how=$access v=$value:u32")
        await tracefs.enable("wprobes/r")
        await tracefs.write(PANIC, "5")
        await tracefs.read(PANIC)
        await tracefs.enable("wprobes/r", False)
        assert {record["how"] for record in await hits(tracefs, "r")} == {'"r"'}

    serve(guest, test)


def test_changes_alone(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        line = "w:wprobes/c w!@panic_timeout:4 old=$old:u32 new=$value:u32"
        await define(tracefs, line, "w:all w@panic_timeout:4")
        assert (await tracefs.read("dynamic_events")).startswith(line + "\n")
        await tracefs.write(PANIC, "0")
        await tracefs.write("events/wprobes/enable", "1")
        for value in "0", "3", "3", "3", "4", "0":
            await tracefs.write(PANIC, value)
        await tracefs.write("events/wprobes/enable", "0")
        assert [record["new"] for record in await hits(tracefs, "c")] == ["3", "4", "0"]
        assert len(await hits(tracefs, "all")) == 6

    serve(guest, test)


# ---- slots, timeouts, kprobes


def test_slots(guest: Guest) -> None:
    """Two of three objects: the oldest goes; a clear of one leaves the other."""

    async def test(tracefs: Served) -> None:
        await make(tracefs, "a", "b", "c")
        await object_watch(tracefs, "w2:watch", ":4")
        assert (await tracefs.read("dynamic_events")).startswith("w2:wprobes/watch rw@-1:8 a=$addr\n")
        await touch(tracefs, "a", "b")
        assert "dentry+0:count=2 # slots: 2/2\n" in await tracefs.read("events/kprobes/te/trigger")
        for name in "abc":
            await tracefs.read(f"/tmp/{name}")
        seen = {record["a"] for record in await hits(tracefs, "watch")}
        assert len(seen) == 2
        await touch(tracefs, "c", "b")
        assert "count=0 # slots: 2/2 evicted: 1\n" in await tracefs.read("events/kprobes/te/trigger")
        newest = await watched(tracefs)
        assert newest in seen  # b's, set again
        await tracefs.write("events/kprobes/tc/trigger", "clear_wprobe:watch")
        assert "clear_wprobe:watch:unlimited # slots: 2/2" in await tracefs.read("events/kprobes/tc/trigger")
        # A clear trigger with a field clears the object it names, and no other. The set trigger is used up.
        await define(tracefs, "p:gone do_truncate dentry=$arg2")
        await tracefs.write("events/kprobes/gone/trigger", "clear_wprobe:watch:dentry if dentry == " + newest)
        await touch(tracefs, "b")
        assert "# slots: 1/2" in await tracefs.read("events/kprobes/gone/trigger")
        assert await tracefs.read("events/wprobes/watch/enable") == "1*\n"
        assert await watched(tracefs) != newest

    serve(guest, test)


def test_rearmed_without_a_clear(guest: Guest) -> None:
    """One slot: the last object wins; without a number the first does, as in the series."""

    async def test(tracefs: Served) -> None:
        await make(tracefs, "a", "b")
        await object_watch(tracefs, "w1:watch")
        await touch(tracefs, "a")
        first = await watched(tracefs)
        await touch(tracefs, "b")
        assert await watched(tracefs) not in (first, "-1")
        await tracefs.write("events/kprobes/te/trigger", "!set_wprobe:watch:dentry")
        await define(tracefs, "-:wprobes/watch", "w:watch rw@-1:8")
        await tracefs.write("events/kprobes/te/trigger", "set_wprobe:watch:dentry")
        await touch(tracefs, "a", "b")
        assert await watched(tracefs) == first
        assert "unlimited # missed: 1\n" in await tracefs.read("events/kprobes/te/trigger")

    serve(guest, test)


def test_a_count_with_slots(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await make(tracefs, "a", "b", "c")
        await object_watch(tracefs, "w4:watch", ":2")
        await touch(tracefs, "a", "b", "c")
        assert "count=0 # slots: 2/4\n" in await tracefs.read("events/kprobes/te/trigger")

    serve(guest, test)


def test_timeout(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await make(tracefs, "a")
        await object_watch(tracefs, option=":timeout=20ms")
        shown = await tracefs.read("events/kprobes/te/trigger")
        assert "set_wprobe:watch:dentry+0:unlimited:timeout=20ms\n" in shown
        await touch(tracefs, "a")
        assert await tracefs.read("events/wprobes/watch/enable") == "1*\n"
        address = await watched(tracefs)
        guest.machine.cpu.now += 20_000_000
        await touch(tracefs)
        await tracefs.read("tracing_on")
        assert await watched(tracefs) == "-1"
        assert await tracefs.read("events/wprobes/watch/enable") == "0*\n"
        before = len(await hits(tracefs, "watch"))
        await tracefs.read("/tmp/a")
        assert len(await hits(tracefs, "watch")) == before
        await touch(tracefs, "a")
        assert await watched(tracefs) == address

    serve(guest, test)


# ---- what is refused


BEYOND = (
    "w4:x rw@jiffies:8",
    "w:x w!@jiffies:8",
    "w:x w@jiffies:3",
    "w:x w@jiffies+1:4",
    "w:x w@jiffies:16",
    "w:x w@jiffies:8 v=$old",
    "w:x w@jiffies:8 v=$at",
    "w:x w@jiffies:8 v=$size",
    "w:x w@jiffies:8 v=$access",
)


def test_strict_is_the_series(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        for line in BEYOND:
            with pytest.raises(OSError, match="Invalid argument"):
                await define(tracefs, line)
        await define(tracefs, "w:x r@jiffies:8", "w:watch rw@-1:8", "p:te do_truncate dentry=$arg2")
        with pytest.raises(OSError, match="Invalid argument"):
            await tracefs.enable("wprobes/x")
        with pytest.raises(OSError, match="not supported"):
            await tracefs.write("events/kprobes/te/trigger", "set_wprobe:watch:dentry")
        assert "Wprobe trigger is not supported on kprobe event" in await tracefs.read("error_log")
        assert "w!" not in await tracefs.read("README")
        assert "# not" not in await tracefs.read("dynamic_events")

    serve(guest, test, "strict")


def test_the_same_is_accepted_otherwise(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        for line in BEYOND:
            await define(tracefs, line)
            await tracefs.enable("wprobes/x")
            await tracefs.enable("wprobes/x", False)
            await define(tracefs, "-:x")
        assert "w!" in await tracefs.read("README")

    serve(guest, test)


OFF_LIMITS = (
    "emergency_restart",
    "kprobe_dispatcher",
    "hw_breakpoint_exceptions_notify",
    "asm_exc_debug",
    "idt_table+16",
    "0xfffffe0000001000",
)


@pytest.mark.parametrize("mode", ["unlimited", "strict"])
def test_off_limits(guest: Guest, mode: str) -> None:
    """What a hit is recorded with is refused, and told why; so are trace buffers, wherever they are now."""

    def word(at: int) -> int:
        return int.from_bytes(guest.machine.memory.read_virtual(at, 8, guest.machine.cpu.read("cr3")), "little")

    def page_of(instance: int) -> int:
        """The first page of the reader of an instance's buffer, by the kernel's structures."""
        at = guest.symbols["ftrace_trace_arrays"]
        for _ in range(instance + 1):
            at = word(at)
        offset = guest.btf.offsetof
        array = at - offset("trace_array", "list")
        buffer = word(array + offset("trace_array", "array_buffer.buffer"))
        per_cpu = word(word(buffer + offset("trace_buffer", "buffers")))
        page = word(per_cpu + offset("ring_buffer_per_cpu", "reader_page"))
        return word(page + offset("buffer_page", "page"))

    async def test(tracefs: Served) -> None:
        await tracefs.files.mkdir(tracefs.root, b"/sys/kernel/tracing/instances/other", 0o755)
        places = [*OFF_LIMITS, *(f"{page_of(number) + 64:#x}" for number in range(2))]
        for place in places:
            with pytest.raises(OSError, match="Invalid argument"):
                await define(tracefs, f"w:off rw@{place}:8")
            *_, what, command, caret = (await tracefs.read("error_log")).splitlines()
            assert what.endswith("wprobe: error: Memory that recording a hit needs cannot be watched")
            assert command[caret.index("^") :] == f"{place}:8"
        assert await tracefs.read("dynamic_events") == ""
        # One that became a trace buffer after it was defined.
        buffer = page_of(0)
        await define(tracefs, f"w:off rw@{guest.symbols['init_task']:#x}:8")
        [wprobe] = tracefs.table.wprobes
        wprobe.slots[0].address = buffer
        with pytest.raises(OSError, match="Invalid argument"):
            await tracefs.enable("wprobes/off")

    serve(guest, test, mode)


def test_user_memory(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        for place in ("0", "0x1000", "0x7fffffffe000"):
            with pytest.raises(OSError, match="Invalid argument"):
                await define(tracefs, f"w:user w@{place}:8")
        assert (await tracefs.read("error_log")).count("wprobe: error: Invalid access memory address") == 3

    serve(guest, test)


def test_memory_that_is_not_mapped(guest: Guest) -> None:
    """It says so, and watches once there is something. Written back, the line is understood."""

    async def test(tracefs: Served) -> None:
        memory = guest.machine.memory
        address, entry = unmapped(guest)
        line = f"w:wprobes/far rw@{address:#x}:8 how=$access v=$value # not mapped"
        await define(tracefs, line, "w:odd rw@0x8000000000000000:8")
        odd = "w:wprobes/odd rw@0x8000000000000000:8 # not mapped"
        assert (await tracefs.read("dynamic_events")).splitlines() == [line, odd]
        await tracefs.write("events/wprobes/enable", "1")
        # Now the kernel maps it, and another probe's argument reads it.
        page = memory.size - PAGE  # of a slot nobody has
        memory.write_u64(page + address % PAGE, 77)
        memory.write_u64(entry, page | 1 << 63 | 0x163)
        assert (await tracefs.read("dynamic_events")).splitlines() == [line.removesuffix(" # not mapped"), odd]
        await define(tracefs, f"p:reader vfs_open v=@{address:#x}:u64")
        await tracefs.enable("kprobes/reader")
        await tracefs.read("/proc/version")
        await tracefs.enable("kprobes/reader", False)
        await tracefs.write("events/wprobes/enable", "0")
        assert (await hits(tracefs, "reader"))[0] == {"v": "77"}
        assert (await hits(tracefs, "far"))[0] == {"how": '"r"', "v": "0x4d"}
        memory.write_u64(entry, 0)

    serve(guest, test)


def unmapped(guest: Guest) -> tuple[int, int]:
    """An address between the kernel's vmalloc areas, and the physical address of its page table entry."""
    memory, table = guest.machine.memory, guest.machine.cpu.read("cr3") & -PAGE
    start = 0xFFFFC90000000000
    for shift in (39, 30, 21):
        table = memory.read_u64(table + (start >> shift & 511) * 8) & 0x000F_FFFF_FFFF_F000
    free = next(number for number in range(512) if not memory.read_u64(table + 8 * number))
    return start + free * PAGE + 64, table + 8 * free


def test_an_argument_of_an_unknown_symbol(guest: Guest) -> None:
    """Accepted at the definition, as in the series, and refused when enabling."""

    async def test(tracefs: Served) -> None:
        line = "w:wprobes/n w@jiffies:8 v=@nosuch_symbol+4:u32 w=+0(@nosuch_symbol)"
        await define(tracefs, line)
        assert await tracefs.read("dynamic_events") == line + "\n"
        with pytest.raises(FileNotFoundError):
            await tracefs.enable("wprobes/n")
        assert await tracefs.read("events/wprobes/n/enable") == "0\n"

    serve(guest, test)


def test_two_triggers_of_an_event_in_any_order(guest: Guest) -> None:
    """One set and one clear for a wprobe, whichever was first and whichever has been removed since."""

    async def test(tracefs: Served) -> None:
        await make(tracefs, "a")
        await object_watch(tracefs, "w2:watch")
        trigger = "events/kprobes/te/trigger"
        commands = {"set": "set_wprobe:watch:dentry", "clear": "clear_wprobe:watch"}
        there = {"set"}
        steps = ["clear", "!set", "set", "!clear", "clear", "!set", "!clear", "clear", "set", "!clear", "!set", "set"]
        for step in steps:
            name = step.removeprefix("!")
            await tracefs.write(trigger, ("!" if name != step else "") + commands[name])
            there ^= {name}
            lines = [line for line in (await tracefs.read(trigger)).splitlines() if not line.startswith("#")]
            assert sorted(line.split("_")[0] for line in lines) == sorted(there), step
            for other in there:
                with pytest.raises(FileExistsError):
                    await tracefs.write(trigger, commands[other])

    serve(guest, test)


def test_truncating_a_trigger_file(guest: Guest) -> None:
    """It removes histograms, and neither trigger of a wprobe's."""

    async def test(tracefs: Served) -> None:
        await object_watch(tracefs)
        trigger = "events/kprobes/te/trigger"
        await tracefs.write(trigger, "clear_wprobe:watch")
        await tracefs.write(trigger, "hist:keys=common_pid")
        before = (await tracefs.read(trigger)).splitlines()
        await tracefs.write(trigger, "", truncate=True)
        after = [line.partition(" #")[0] for line in (await tracefs.read(trigger)).splitlines()]
        assert [line for line in before if not line.startswith("hist:")] == after
        assert len(before) == len(after) + 1 == 3

    serve(guest, test)


# ---- nothing shows how it is done


def test_debugfs_shows_no_carrier_either(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await define(tracefs, "p:kp vfs_read", "p:seen emergency_restart")
        await define(tracefs, "w:grp/seen rw@jiffies:8", "w:more rw@jiffies")
        listed = await tracefs.read("/sys/kernel/debug/kprobes/list")
        assert listed.count("emergency_restart") == 1
        assert listed.count("vfs_read") == 1
        profile = [line.split()[0] for line in (await tracefs.read("kprobe_profile")).splitlines()]
        assert profile == ["kp", "seen"]
        again = await tracefs.read("/sys/kernel/debug/tracing/dynamic_events")
        assert again == await tracefs.read("dynamic_events")
        assert "w:grp/seen rw@jiffies:8\n" in again
        with pytest.raises(OSError, match="Invalid argument"):
            await tracefs.write("/sys/kernel/debug/tracing/dynamic_events", "w:bad x@jiffies")
        assert "Bad memory access type" in await tracefs.read("/sys/kernel/debug/tracing/error_log")

    serve(guest, test)
