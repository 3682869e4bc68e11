"""What the wprobe series' own seven selftests ask for, on a strict mount's files.

Two are in tests/mount: adding and removing, and errors of definitions. Where the others take timers of a sample module,
here are dentries of the kernel's own. The seventh takes a CPU off and on while a wprobe is set, and there is one CPU.
"""

from __future__ import annotations

import pytest

from emulator.guest import Guest
from tests.guest.served import Served, define, hits, make, serve, touch, watched

TRIGGER_ERRORS = (
    "set_wprobe:^non_exist_wprobe:dentry",
    "set_wprobe:^",
    "set_wprobe:watch^",
    "set_wprobe:watch:^non_exist_field",
)


@pytest.fixture(autouse=True)
def _fprobes(guest: Guest) -> None:
    if "trace_fprobe_create" not in guest.symbols:
        pytest.skip("this kernel has no fprobe events")


async def functions(tracefs: Served) -> None:
    """Define events on two functions."""
    await define(tracefs, "f:fprobes/testevent do_truncate dentry=$arg2", "f:fprobes/other vfs_fallocate file=$arg1")


def test_the_series_trigger(guest: Guest) -> None:
    """Set, watch, clear by another event, remove in the order of the series' test."""

    async def test(tracefs: Served) -> None:
        await functions(tracefs)
        await make(tracefs, "a")
        await define(tracefs, "w:watch rw@-1:8 address=$addr value=$value")
        event, other = "events/fprobes/testevent", "events/fprobes/other"
        for each in event, other:
            await tracefs.write(f"{each}/enable", "1")
        await tracefs.write(f"{event}/trigger", "set_wprobe:watch:dentry")
        assert (await tracefs.read(f"{event}/trigger")).startswith("set_wprobe")
        await touch(tracefs, "a")
        await tracefs.read("/tmp/a")
        records = await hits(tracefs, "watch")
        assert {record["address"] for record in records} == {await watched(tracefs)}
        await tracefs.write(f"{other}/trigger", "clear_wprobe:watch")
        await tracefs.write(f"{event}/trigger", "!set_wprobe:watch:dentry")
        await touch(tracefs, "a")
        await tracefs.read("/tmp/a")
        assert len(await hits(tracefs, "watch")) == len(records)
        await tracefs.write(f"{other}/trigger", "!clear_wprobe:watch")
        for each in event, other:
            assert (await tracefs.read(f"{each}/trigger")).startswith("# Available triggers:")
            await tracefs.write(f"{each}/enable", "0")
        await tracefs.write("dynamic_events", "", truncate=True)
        assert await tracefs.read("dynamic_events") == ""

    serve(guest, test, "strict")


def test_the_series_trigger_errors(guest: Guest) -> None:
    async def test(tracefs: Served) -> None:
        await functions(tracefs)
        await define(tracefs, "w:watch rw@-1:8")

        async def refused(marked: str) -> None:
            with pytest.raises(OSError, match="Errno"):
                await tracefs.write("events/fprobes/testevent/trigger", marked.replace("^", ""))
            *_, what, _, caret = (await tracefs.read("error_log")).splitlines()
            assert "] wprobe_trigger: error: " in what
            assert caret.index("^") == len("  Command: ") + marked.index("^")

        for marked in TRIGGER_ERRORS:
            await refused(marked)
        await tracefs.enable("wprobes/watch")
        await refused("set_wprobe:^watch:dentry")

    serve(guest, test, "strict")


def test_the_series_btf_offset_and_typecast(guest: Guest) -> None:
    """Armed at a member of a member, and read through the structure that lies around it."""

    async def test(tracefs: Served) -> None:
        await functions(tracefs)
        await make(tracefs, "a")
        line = "w:wprobes/watch rw@-1:8 a=$addr flags=(dentry,d_lockref)$addr->d_flags"
        await define(tracefs, line)
        cast = "set_wprobe:watch:(dentry,d_lockref)dentry->d_lockref"
        await tracefs.write("events/fprobes/testevent/trigger", cast)
        assert "set_wprobe:watch:dentry+0:unlimited\n" in await tracefs.read("events/fprobes/testevent/trigger")
        await tracefs.write("events/fprobes/testevent/trigger", "!set_wprobe:watch:dentry")
        offset = guest.btf.offsetof("dentry", "d_lockref")
        await tracefs.write("events/fprobes/testevent/trigger", "set_wprobe:watch:(dentry)dentry->d_lockref")
        assert f"dentry+{offset}:unlimited\n" in await tracefs.read("events/fprobes/testevent/trigger")
        await touch(tracefs, "a")
        await tracefs.read("/tmp/a")
        records = await hits(tracefs, "watch")
        assert records
        dentry = int(records[0]["a"], 16) - offset
        memory, cr3 = guest.machine.memory, guest.machine.cpu.read("cr3")
        at = dentry + guest.btf.offsetof("dentry", "d_flags")
        assert int(records[-1]["flags"]) == int.from_bytes(memory.read_virtual(at, 4, cr3), "little")

    serve(guest, test, "strict")
