"""What wprobe commands may say beyond the series: parsed strictly, shown as written, refused unless asked for."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe import definition, errors, trigger
from fakefs.wprobe.errors import ProbeError
from tests.unit.test_wprobe_definition import JIFFIES, Kernel
from tests.unit.test_wprobe_trigger import FIELDS, Structs, Target
from tests.wprobe_lines import accepted, texts

TARGETS = {"watch": Target(False), "busy": Target(True)}


def define(line: str) -> definition.Definition:
    return definition.parse(line, Kernel(), Kernel(), extended=True)


def read(text: str, *, extended: bool = True) -> trigger.Trigger:
    found = trigger.parse(text, FIELDS, TARGETS.get, structs=Structs(), extended=extended)
    assert found
    return found


SHOWN = [
    ("w1:ev w@jiffies:8", "w1:wprobes/ev w@jiffies:8"),
    ("w64:grp/ev rw@-1:8", "w64:grp/ev rw@-1:8"),
    ("w4:grp/ r@jiffies+1:3", "w4:grp/jiffies r@jiffies+1:3"),
    ("w:ev w!@jiffies", "w:wprobes/ev w!@jiffies:4"),
    ("w2:ev w!@-1:0x1000 $old", "w2:wprobes/ev w!@-1:4096 arg1=$old"),
    ("w:e @jiffies:99 o=$old s=$size:u8 $access", "w:wprobes/e rw@jiffies:99 o=$old s=$size:u8 arg3=$access"),
    ("w:e @jiffies v=+8($old) w=(mm_struct)$at->pgd", "w:wprobes/e rw@jiffies:4 v=+8($old) w=(mm_struct)$at->pgd"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "shown"), SHOWN)
def test_shown(line: str, shown: str) -> None:
    assert define(line).show() == shown
    assert define(shown).show() == shown
    with pytest.raises(ProbeError):
        definition.parse(line, Kernel(), Kernel())


def test_the_dummy_address_of_earlier_versions() -> None:
    """Version 18 refuses any 0, and its tests see to it with `w@0:4`."""
    defined = define("w:watch rw@0:8 address=$addr")
    assert (defined.dummy, defined.address) == (True, Kernel.dummy)
    assert defined.show() == "w:wprobes/watch rw@-1:8 address=$addr"
    with pytest.raises(ProbeError):
        definition.parse("w:watch rw@0:8", Kernel(), Kernel())
    for line in ("w w@0:4", "w w@0:8", "w rw@0", "w rw@0x0:8"):
        with pytest.raises(ProbeError):
            define(line)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("w^0:ev w@jiffies", errors.BAD_SLOTS),
        ("w^65:ev w@jiffies", errors.BAD_SLOTS),
        ("w^04:ev w@jiffies", errors.BAD_SLOTS),
        ("w^99999999999:ev w@jiffies", errors.BAD_SLOTS),
        ("w^10 w@jiffies", errors.NO_MAXACT),
        ("w^-1:ev w@jiffies", errors.NO_MAXACT),
        ("w^x:ev w@jiffies", errors.NO_MAXACT),
        ("w^4x:ev w@jiffies", errors.NO_MAXACT),
        ("w4:^ w@jiffies", errors.NO_EVENT_NAME),
        ("w4:^1bad w@jiffies", errors.BAD_EVENT_NAME),
        ("w16:grp/^a-b w@jiffies", errors.BAD_EVENT_NAME),
        ("w4:ev ^r!@jiffies", errors.BAD_CHANGE),
        ("w4:ev ^rw!@jiffies", errors.BAD_CHANGE),
        ("w4:ev ^!@jiffies", errors.BAD_CHANGE),
        ("w4:ev ^w!!@jiffies", errors.BAD_ACCESS_TYPE),
        ("w4:ev ^!w@jiffies", errors.BAD_ACCESS_TYPE),
        ("w w@jiffies:^0", errors.BAD_ACCESS_LEN),
        ("w w@jiffies:^4097", errors.BAD_ACCESS_LEN),
        ("w w@jiffies:^-8", errors.BAD_ACCESS_LEN),
        ("w w@^0xfffffffffffffff9:8", errors.BAD_ACCESS_ADDR),
        ("w w@^0x7fffffffeff0:4096", errors.BAD_ACCESS_ADDR),
        ("w w@jiffies v=^$older", errors.BAD_VAR),
        ("w w@jiffies v=+0(^$access)", errors.BAD_VAR),
        ("w w@jiffies v=+0(^$size)", errors.BAD_VAR),
        ("w w@jiffies v=(task_struct)^$size->pid", errors.BAD_VAR),
    ],
)
def test_error_points_at_the_fault(line: str, text: str) -> None:
    with pytest.raises(ProbeError) as caught:
        define(line.replace("^", ""))
    assert caught.value.entry
    assert (caught.value.entry.text, caught.value.entry.caret) == (text, line.index("^"))


def test_said_to_the_carrier() -> None:
    line = "w2:ev w!@jiffies:8 o=$old:u32 a=$at s=$size x=$access p=+0(+8($old)):string n=@nosuch+4:u8"
    assert define(line).carrier() == (
        "p:wprobes/ev emergency_restart o=%r8:u32 a=%r11:x64 s=%r9:u32 x=+0(%r14):string p=+0(+8(%r8)):string "
        "n=@0xffffffffffffffff:u8"
    )
    assert define(line).unresolved
    assert not define("w:ev w@jiffies v=@jiffies+4 x=@0x7 y=+0(@linux_banner)").unresolved


def test_off_limits_points_at_the_address() -> None:
    entry = define("w4:ev w!@jiffies:8").off_limits().entry
    assert entry
    assert entry.command[entry.caret :] == "jiffies:8"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("set_wprobe:watch:dfd:timeout=500ms", "set_wprobe:watch:dfd+0:unlimited:timeout=500ms"),
        ("set_wprobe:watch:dfd:3:timeout=1500us if dfd", "set_wprobe:watch:dfd+0:count=3:timeout=1500us if dfd"),
        ("set_wprobe:watch:dfd-8:timeout=2000ms:count=3", None),
        ("set_wprobe:watch:dfd-8:unlimited:timeout=2000ms", "set_wprobe:watch:dfd-8:unlimited:timeout=2s"),
    ],
)
def test_timeouts(line: str, shown: str | None) -> None:
    if shown is None:
        with pytest.raises(ProbeError):
            read(line)
    else:
        assert read(line).show() == shown
        assert read(shown) == read(line)


@pytest.mark.parametrize(
    ("line", "number", "text"),
    [
        ("set_wprobe:watch:dfd:^timeout=", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^timeout=0ms", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^timeout=5", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^timeout=5m", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^timeout=-5ms", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^timeout=999999999999999999s", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:timeout=5s:^timeout=5s", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:3:^4", errno.EINVAL, errors.BAD_TIMEOUT),
        ("set_wprobe:watch:dfd:^x:timeout=5s", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:^timeout=5s", errno.ENOENT, errors.NO_EVENT_FIELD),
        ("clear_wprobe:watch:dfd:^timeout=5s", errno.EINVAL, errors.BAD_IMM),
        ("set_wprobe:^busy:dfd", errno.EBUSY, errors.WPROBE_BUSY),
    ],
)
def test_bad_timeouts(line: str, number: int, text: str) -> None:
    with pytest.raises(ProbeError) as caught:
        read(line.replace("^", ""))
    assert caught.value.entry
    found = caught.value
    assert (found.number, caught.value.entry.text, caught.value.entry.caret) == (number, text, line.index("^"))


def test_the_series_has_no_timeouts() -> None:
    with pytest.raises(ProbeError) as caught:
        read("set_wprobe:watch:dfd:timeout=5s", extended=False)
    assert caught.value.entry
    assert caught.value.entry.text == errors.BAD_IMM
    assert read("set_wprobe:watch:dfd:3:timeout=5s", extended=False).show() == "set_wprobe:watch:dfd+0:count=3"


def test_comments_are_dropped_when_written_back() -> None:
    wanted = read("set_wprobe:watch:dfd:timeout=5ms")
    shown = wanted.show(3, slots="slots: 1/4 evicted: 2")
    assert shown == "set_wprobe:watch:dfd+0:unlimited:timeout=5ms # slots: 1/4 evicted: 2 missed: 3"
    assert read(shown) == wanted


heads = st.builds("w{}:{}ev".format, st.one_of(st.just(""), st.integers(1, 64)), st.sampled_from(["", "grp/"]))
places = st.builds(
    "{}@{}:{}".format,
    st.sampled_from(["", "r", "w", "w!", "rw"]),
    st.sampled_from(["jiffies", "jiffies+3", "-1", f"{JIFFIES + 1:#x}"]),
    st.integers(1, 4096),
)
arguments = st.lists(
    st.sampled_from(
        ["$old", "$at", "$size", "$access", "$addr", "$value:u8", "+0($at):u32", "@nosuch", "@nosuch+8:u16"]
    ),
    max_size=5,
)


@given(heads, places, arguments)
def test_what_is_shown_defines_the_same_again(head: str, place: str, args: list[str]) -> None:
    defined = define(" ".join([head, place, *args]))
    again = define(defined.show())
    assert again.show() == defined.show()
    assert again.carrier() == defined.carrier()
    assert (again.slots, again.changes, again.length, again.address, again.unresolved) == (
        defined.slots, defined.changes, defined.length, defined.address, defined.unresolved,
    )  # fmt: skip


@given(st.integers(1, 1 << 61), st.sampled_from([None, 0, 7]), st.sampled_from(["", "dfd == 1"]))
def test_a_timeout_is_read_as_shown(timeout: int, count: int | None, condition: str) -> None:
    wanted = trigger.Trigger("set", "watch", "dfd", 8, count, condition or None, timeout=timeout)
    if timeout < 10**18:
        assert read(wanted.show()) == wanted


@given(texts(*"w:/.@+-()$!=,rx0148 ", "jiffies", "$old", "$at", "$access", "->", "task_struct", "pid"))
def test_nothing_but_probe_error_is_raised(text: str) -> None:
    for line in (f"w{text}", f"w4:ev w!@jiffies a={text}", f"w w@{text}"):
        if defined := accepted(define, line):
            assert 0 < defined.length <= definition.MAX_LENGTH
            assert 0 <= defined.slots <= definition.MAX_SLOTS
            assert definition.TASK_SIZE <= defined.address <= (1 << 64) - defined.length


words = st.sampled_from([*":+-=0178", "dfd", "timeout=", "5ms", "count=", "unlimited", " if dfd"])


@given(st.lists(words).map("".join))
def test_triggers_raise_nothing_but_probe_error(text: str) -> None:
    try:
        wanted = read(f"set_wprobe:watch:{text}")
    except ProbeError:
        return
    assert read(wanted.show()) == wanted
