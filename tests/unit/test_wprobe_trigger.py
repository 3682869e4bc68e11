from __future__ import annotations

import errno
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe import errors
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.trigger import Trigger, parse
from fakefs.wprobe.typecast import Member

FIELDS = {"dfd": (16, 8), "count": (24, 4), "timer": (32, 8), "unlimited2": (40, 8), "common_pid": (4, 4)}


class Target(NamedTuple):
    in_use: bool


TARGETS = {"watch": Target(False), "busy": Target(True)}


class Structs:
    def known(self, struct: str) -> bool:
        return struct == "foo"

    def member(self, struct: str, path: str) -> Member | None:
        return {
            "timer": Member(16),
            "timer.expires": Member(32),
            "flag": Member(8, bitfield=True),
            "counter": Member(0),
        }.get(path)


def read(text: str, *, on_kprobe: bool = False) -> Trigger:
    found = parse(text, FIELDS, TARGETS.get, structs=Structs(), on_kprobe=on_kprobe)
    assert found
    return found


@pytest.mark.parametrize(
    ("line", "number", "text"),
    [
        # The series' own selftest (trigger-wprobe-syntax-errors.tc).
        ("set_wprobe:^non_exist_wprobe:dfd", errno.ENOENT, errors.WPROBE_NOT_FOUND),
        ("set_wprobe:^", errno.EINVAL, errors.WPROBE_NOT_FOUND),
        ("set_wprobe:watch^", errno.EINVAL, errors.WPROBE_NEED_FIELD),
        ("set_wprobe:watch:^non_exist_field", errno.ENOENT, errors.NO_EVENT_FIELD),
        ("set_wprobe:^busy:dfd", errno.EBUSY, errors.WPROBE_BUSY),
        ("!set_wprobe:watch^", errno.EINVAL, errors.WPROBE_NEED_FIELD),
        ("!set_wprobe:^nosuch:dfd", errno.ENOENT, errors.WPROBE_NOT_FOUND),
        ("set_wprobe:watch:^count", errno.ENOEXEC, errors.WPROBE_BAD_FIELD),
        ("set_wprobe:watch:dfd^+", errno.EINVAL, errors.BAD_DEREF_OFFS),
        ("set_wprobe:watch:dfd^-0x8000000000000001", errno.EINVAL, errors.BAD_DEREF_OFFS),
        ("set_wprobe:watch:dfd:^", errno.EINVAL, errors.BAD_IMM),
        ("set_wprobe:watch:dfd:^count=", errno.EINVAL, errors.BAD_IMM),
        ("set_wprobe:watch:dfd:^x:4", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:^", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:^-8", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:^unlimitedly", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:dfd:^-1", errno.EINVAL, errors.BAD_IMM),
        ("clear_wprobe:watch:^count=x", errno.EINVAL, errors.BAD_IMM),
        ("set_wprobe:watch:(^foo", errno.EINVAL, errors.DEREF_OPEN_BRACE),
        ("set_wprobe:watch:(foo)^timer", errno.EINVAL, errors.TYPECAST_REQ_FIELD),
        ("set_wprobe:watch:(^bar)timer->timer", errno.ENOENT, errors.BAD_BTF_TID),
        ("set_wprobe:watch:(foo,^bar)timer->timer", errno.ENOENT, errors.NO_BTF_FIELD),
        ("set_wprobe:watch:(foo,bar)timer->^baz", errno.ENOENT, errors.NO_BTF_FIELD),
        ("set_wprobe:watch:(bar)timer->timer^+x", errno.EINVAL, errors.BAD_DEREF_OFFS),
        ("set_wprobe:watch:(foo)timer->^bar", errno.ENOENT, errors.NO_BTF_FIELD),
        ("set_wprobe:watch:(foo)timer->^flag", errno.EINVAL, errors.NO_BTF_FIELD),
        ("set_wprobe:watch:(foo)timer->timer^-x", errno.EINVAL, errors.BAD_DEREF_OFFS),
        ("set_wprobe:watch:(foo)^count->timer", errno.ENOEXEC, errors.WPROBE_BAD_FIELD),
    ],
)
def test_error_points_at_the_fault(line: str, number: int, text: str) -> None:
    with pytest.raises(ProbeError) as caught:
        read(line.replace("^", ""))
    entry = caught.value.entry
    assert entry
    assert (caught.value.number, entry.text, entry.caret) == (number, text, line.index("^"))
    # The command is cut where the kernel's parser has put its NULs: before the second colon, here.
    assert entry.command == ":".join(line.replace("^", "").split(":")[:2]).rstrip(":")


def test_on_a_kprobe() -> None:
    with pytest.raises(ProbeError) as caught:
        read("set_wprobe:watch:dfd if count == 1", on_kprobe=True)
    assert caught.value.number == errno.EOPNOTSUPP
    assert caught.value.entry
    assert caught.value.entry.command == "set_wprobe:watch:dfd"


@pytest.mark.parametrize("line", ["set_wprobe:watch:dfd if", "set_wprobe:watch:dfd when x", "clear_wprobe:watch iffy"])
def test_what_is_no_filter_is_refused_silently(line: str) -> None:
    with pytest.raises(ProbeError) as caught:
        read(line)
    assert (caught.value.number, caught.value.entry) == (errno.EINVAL, None)


@pytest.mark.parametrize(
    "line", ["", " ", "stacktrace", "hist:keys=x", "set_wprobes:watch", "#set_wprobe:watch:dfd", "!!set_wprobe:watch"]
)
def test_other_triggers_are_not_ours(line: str) -> None:
    assert parse(line, FIELDS, TARGETS.get) is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("set_wprobe:watch:dfd", "set_wprobe:watch:dfd+0:unlimited"),
        (" set_wprobe:watch:dfd-0x8:3 \n", "set_wprobe:watch:dfd-8:count=3"),
        ("set_wprobe:watch:dfd:count=0x10", "set_wprobe:watch:dfd+0:count=16"),
        ("set_wprobe:watch:dfd:count=unlimited", None),
        ("set_wprobe:watch:dfd:3:4", "set_wprobe:watch:dfd+0:count=3"),
        ("clear_wprobe:watch", "clear_wprobe:watch:unlimited"),
        ("clear_wprobe:watch:+8", "clear_wprobe:watch:count=8"),
        ("clear_wprobe:watch:unlimited", "clear_wprobe:watch:unlimited"),
        ("clear_wprobe:watch:unlimited2", "clear_wprobe:watch:unlimited2+0:unlimited"),
        ("clear_wprobe:watch:0", "clear_wprobe:watch:count=0"),
        ("clear_wprobe:watch:dfd+8:2 if  count > 1 ", "clear_wprobe:watch:dfd+8:count=2 if  count > 1"),
        ("clear_wprobe:busy", "clear_wprobe:busy:unlimited"),
        ("set_wprobe:watch:(foo)timer->timer.expires", "set_wprobe:watch:timer+32:unlimited"),
        ("set_wprobe:watch:(foo,timer)timer->timer.expires", "set_wprobe:watch:timer+16:unlimited"),
        ("set_wprobe:watch:(foo,timer)timer->counter-4", "set_wprobe:watch:timer-20:unlimited"),
    ],
)
def test_shown(line: str, shown: str | None) -> None:
    if shown is None:
        with pytest.raises(ProbeError):
            read(line)
    else:
        assert read(line).show() == shown


def test_shown_with_what_has_happened_since() -> None:
    trigger = read("set_wprobe:watch:dfd:3 if count > 1")
    assert trigger.show(5, 1) == "set_wprobe:watch:dfd+0:count=1 if count > 1 # missed: 5"
    assert read(trigger.show(5)) == trigger


def test_removal_looks_at_little() -> None:
    removal = read("!set_wprobe:busy:dfd+8:abc if nonsense")
    assert removal == Trigger("set", "busy", "dfd", 8, remove=True)
    assert read("!clear_wprobe:busy").remove


def test_a_field_named_unlimited_goes_first() -> None:
    fields = FIELDS | {"unlimited": (48, 8)}
    found = parse("clear_wprobe:watch:unlimited", fields, TARGETS.get)
    assert found
    assert found.field == "unlimited"


@given(
    st.sampled_from(["set", "clear"]),
    st.sampled_from(["", ":dfd", ":timer+8", ":dfd-0x10", ":(foo)timer->timer", ":(foo,timer)dfd->counter+1"]),
    st.sampled_from(["", ":3", ":count=0", ":unlimited"]),
    st.sampled_from(["", " if count == 1", " if dfd & 1 || count"]),
    st.integers(0, 9),
)
def test_what_is_shown_is_read_the_same_again(kind: str, field: str, count: str, condition: str, missed: int) -> None:
    line = f"{kind}_wprobe:watch{field if field or kind == 'clear' else ':dfd'}{count}{condition}"
    trigger = read(line)
    assert read(trigger.show(missed)) == trigger


tokens = st.sampled_from([*":+-()!#,.> \t0178", "watch", "busy", "dfd", "timer", "count", "->", "foo", "if"])


@given(
    st.sampled_from(["set_wprobe:", "clear_wprobe:", "!set_wprobe:watch:", "set_wprobe:watch:(", ""]),
    st.one_of(st.text(st.characters(codec="latin-1")), st.lists(tokens).map("".join)),
)
def test_nothing_but_probe_error_is_raised(start: str, rest: str) -> None:
    try:
        parse(start + rest, FIELDS, TARGETS.get, structs=Structs())
    except ProbeError as refused:
        entry = refused.entry
    else:
        entry = None
    if entry:
        assert 0 <= entry.caret <= len(start + rest)
        assert (start + rest).strip(" \t\n\v\f\r\xa0").startswith(entry.command)
