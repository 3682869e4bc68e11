from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe import errors
from fakefs.wprobe.definition import TASK_SIZE, Definition, parse
from fakefs.wprobe.errors import LogEntry, ProbeError
from fakefs.wprobe.typecast import Member
from tests.wprobe_lines import accepted, texts

JIFFIES = 0xFFFFFFFF81C07A00


class Kernel:
    """Symbols and structures of a kernel that has few."""

    dummy = 0xFFFFFFFF820F8940

    def lookup(self, name: str) -> int | None:
        return {"jiffies": JIFFIES, "linux_banner": JIFFIES + 64, "foo.isra.0": JIFFIES + 128}.get(name)

    def known(self, struct: str) -> bool:
        return struct in ("task_struct", "mm_struct")

    def member(self, struct: str, path: str) -> Member | None:
        if struct == "mm_struct":
            return Member(80, "x64") if path == "pgd" else None
        return {
            "pid": Member(1000, "s32"),
            "mm": Member(920, "x64", "mm_struct"),
            "comm": Member(1500),
            "tasks": Member(900),
            "se.on_rq": Member(152, "u8"),
            "flag": Member(1104, "b1@3/32", bitfield=True),
        }.get(path)


def define(line: str) -> Definition:
    return parse(line, Kernel(), Kernel())


def refusal(line: str) -> tuple[int, str, int]:
    """The errno, text and caret a line is refused with."""
    with pytest.raises(ProbeError) as caught:
        define(line)
    assert caught.value.entry
    assert caught.value.errno == caught.value.number
    return caught.value.number, caught.value.entry.text, caught.value.entry.caret


def marked(line: str) -> tuple[str, int]:
    """A line with `^` in it, without it, and where it was."""
    return line.replace("^", ""), line.index("^")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        # The series' own selftest (wprobes_syntax_errors.tc).
        ("^w", errors.NO_ARG_BODY),
        ("w^10 w@jiffies", errors.NO_MAXACT),
        ("w ^symbol", errors.BAD_ACCESS_FMT),
        ("w ^a@symbol", errors.BAD_ACCESS_TYPE),
        ("w w@^0:4", errors.BAD_ACCESS_ADDR),
        ("w w@jiffies^+offset", errors.BAD_PROBE_ADDR),
        ("w w@jiffies:^100", errors.BAD_ACCESS_LEN),
        ("w w@jiffies ^$arg1", errors.BAD_VAR),
        ("w w@jiffies ^$retval", errors.BAD_VAR),
        ("w w@jiffies ^$stack", errors.BAD_VAR),
        ("w w@jiffies ^%ax", errors.BAD_VAR),
        # A bad spec masks a bad name, a bad name bad arguments.
        ("w:1bad ^x@jiffies", errors.BAD_ACCESS_TYPE),
        ("w:^1bad w@jiffies $arg1", errors.BAD_EVENT_NAME),
        ("w:^ w@jiffies", errors.NO_EVENT_NAME),
        ("w:^1/ev w@jiffies", errors.BAD_GROUP_NAME),
        ("w:grp/^a-b w@jiffies", errors.BAD_EVENT_NAME),
        (f"w:^{'g' * 64}/ev w@jiffies", errors.GROUP_TOO_LONG),
        (f"w:grp/^{'e' * 64} w@jiffies", errors.EVENT_TOO_LONG),
        ("w ^w:8@jiffies", errors.BAD_ACCESS_TYPE),
        ("w ^wr@jiffies", errors.BAD_ACCESS_TYPE),
        ("w w@^0x7ffffffff000-8", errors.BAD_ACCESS_ADDR),
        ("w w@^0x7fffffffeff8:8", errors.BAD_ACCESS_ADDR),
        ("w w@jiffies^+0x80000000", errors.BAD_PROBE_ADDR),
        ("w w@jiffies:^1_0", errors.BAD_ACCESS_LEN),
        ("w w@jiffies:^08", errors.BAD_ACCESS_LEN),
        ("w w@jiffies a=$addr ^a=$value", errors.USED_ARG_NAME),
        ("w w@jiffies ^1a=$addr", errors.BAD_ARG_NAME),
        (f"w w@jiffies ^{'a' * 33}=$addr", errors.ARG_NAME_TOO_LONG),
        ("w w@jiffies a=^", errors.NO_ARG_BODY),
        ("w w@jiffies a=+0(^%di)", errors.BAD_VAR),
        ("w w@jiffies a=+0(+8(^$arg1)):u32", errors.BAD_VAR),
        ("w w@jiffies a=+0(^foo)", errors.NOSUP_BTFARG),
        ("w w@jiffies a=this_cpu_read(^$stack)", errors.BAD_VAR),
        ("w w@jiffies a=(^task_struct", errors.DEREF_OPEN_BRACE),
        ("w w@jiffies a=(^nosuch)$addr->pid", errors.BAD_BTF_TID),
        ("w w@jiffies a=(task_struct,^nosuch)$addr->pid", errors.NO_BTF_FIELD),
        ("w w@jiffies a=(task_struct)^$arg1->pid", errors.BAD_VAR),
        ("w w@jiffies a=(task_struct)^task->pid", errors.NOSUP_BTFARG),
        ("w w@jiffies a=(task_struct)$addr->pid->^pid", errors.NO_PTR_STRCT),
        ("w w@jiffies a=(task_struct)$addr->mm->^pid", errors.NO_BTF_FIELD),
        ("w w@linux_banner:8 s=+0($addr):string y=$addr:^symstr", errors.BAD_SYMSTRING),
    ],
)
def test_error_points_at_the_fault(line: str, text: str) -> None:
    line, caret = marked(line)
    _, found, column = refusal(line)
    assert (found, column) == (text, caret)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("w w@nosuch", errno.ENOENT),
        ("w w@0", errno.EINVAL),
        ("w w@jiffies a=(nosuch)$addr->pid", errno.ENOENT),
        ("w w@jiffies a=" + "+0(" * 20 + "$addr", errno.ENOSPC),
        ("w w@jiffies" + " $addr" * 129, errno.E2BIG),
    ],
)
def test_errno(line: str, number: int) -> None:
    assert refusal(line)[0] == number


def test_what_a_kernel_lacks_is_said() -> None:
    line, caret = marked("w w@jiffies a=+0(^this_cpu_read(@jiffies))")
    with pytest.raises(ProbeError) as caught:
        parse(line, Kernel(), Kernel(), per_cpu=False)
    assert caught.value.entry
    assert (caught.value.entry.text, caught.value.entry.caret) == (errors.NO_PER_CPU, caret)


def test_too_many_arguments_points_at_the_first() -> None:
    names = " ".join(f"a{number}=$addr" for number in range(1, 130))
    line, caret = marked(f"w:ev w@jiffies ^{names}")
    assert refusal(line) == (errno.E2BIG, errors.TOO_MANY_ARGS, caret)
    assert len(define(line.rpartition(" ")[0]).args) == 128


def test_taken_name() -> None:
    defined = define("w:ev   w@jiffies    v=$value")
    sibling = defined.taken(by_wprobe=True)
    assert sibling.number == errno.EBUSY
    assert sibling.entry == LogEntry("wprobe", errors.NO_SIBLING, "w:ev w@jiffies v=$value", 0)
    assert defined.taken(by_wprobe=False).number == errno.EEXIST


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("w @jiffies", "w:wprobes/jiffies rw@jiffies:4"),
        ("w w@foo.isra.0", "w:wprobes/foo_isra_0 w@foo.isra.0:4"),
        ("w:g/ w@jiffies+0", "w:g/jiffies w@jiffies:4"),
        ("w w@jiffies+0x10:8", "w:wprobes/jiffies w@jiffies+16:8"),
        (f"w w@{JIFFIES}", "w:wprobes/w_0xffffffff81c07a00 w@0xffffffff81c07a00:4"),
        ("w:ev r@-1:1 $value:u8 b=@jiffies", "w:wprobes/ev r@-1:1 arg1=$value:u8 b=@jiffies"),
        (f"w w@0x{Kernel.dummy:x}", f"w:wprobes/w_0x{Kernel.dummy:x} w@-1:4"),
    ],
)
def test_shown(line: str, shown: str) -> None:
    assert define(line).show() == shown


def test_shows_where_a_trigger_moved_it() -> None:
    assert define("w:ev w@-1:8").show(JIFFIES) == f"w:wprobes/ev w@0x{JIFFIES:x}:8"
    assert define("w:ev w@jiffies:8").show(Kernel.dummy) == "w:wprobes/ev w@jiffies:8"
    assert define(f"w:ev w@0x{JIFFIES:x}:8").show(Kernel.dummy) == "w:wprobes/ev w@-1:8"


@pytest.mark.parametrize(
    ("arg", "carried"),
    [
        ("$addr", "arg1=%orig_ax"),
        ("$value", "arg1=+0(%orig_ax):x64"),
        ("v=$value:u32", "v=+0(%orig_ax):u32"),
        ("v=$value:b4@4/32", "v=+0(%orig_ax):b4@4/32"),
        ("v=$value:x8[8]", "v=+0(%orig_ax):x8[8]"),
        ("s=+0($addr):string", "s=+0(%orig_ax):string"),
        ("u=+u0($addr):ustring", "u=+u0(%orig_ax):ustring"),
        ("c=-8(+0x10($value))", "c=-8(+0x10(+0(%orig_ax)))"),
        ("n=@jiffies", "n=@jiffies"),
        ("i=\\10", "i=\\10"),
        ('i=\\"ab"', 'i=\\"ab"'),
        ("p=this_cpu_ptr($addr)", "p=this_cpu_ptr(%orig_ax)"),
        ("p=(task_struct)$addr->pid", "p=+1000(%orig_ax):s32"),
        ("p=(task_struct)$addr->pid:x32", "p=+1000(%orig_ax):x32"),
        ("p=(task_struct)$value->se.on_rq", "p=+152(+0(%orig_ax)):u8"),
        ("p=(task_struct,tasks)$addr->comm:string", "p=+600(%orig_ax):string"),
        ("p=(task_struct,comm)$addr->pid", "p=-500(%orig_ax):s32"),
        ("p=(task_struct)$addr->mm->pgd", "p=+80(+920(%orig_ax)):x64"),
        ("p=(task_struct)$addr->flag", "p=+1104(%orig_ax):b1@3/32"),
        ("p=(task_struct)$addr->tasks", "p=+900(%orig_ax)"),
        ("p=+8((task_struct)$addr->mm)", "p=+8(+920(%orig_ax))"),
    ],
)
def test_carrier(arg: str, carried: str) -> None:
    defined = define(f"w:grp/ev rw@-1:8 {arg}")
    assert defined.carrier() == f"p:grp/ev emergency_restart {carried}"
    assert defined.carrier("panic") == f"p:grp/ev panic {carried}"


@pytest.mark.parametrize(
    ("line", "fault", "text"),
    [
        # What the guest says of the carrier, at `fault` there, and where the wprobe series says it: `^`.
        ("w:ev w@jiffies a=$value:^foo", "foo", "Unknown type is specified"),
        ("w:ev w@jiffies v=(task_struct)$addr->pid b=^@jiffies+", "@jiffies+", "whatever"),
        ("w w@jiffies v=$value ^b=\\x", "b=", "whatever"),
        ("w:ev w@jiffies v=^$value w=$addr", "%orig_ax):x64", "whatever"),
        ("w:ev w@jiffies v=$value^ w=$addr", ":x64", "whatever"),
        ("^w:ev w@jiffies", "p:wprobes", "whatever"),
        ("w:ev ^w@jiffies", "emergency", "whatever"),
    ],
)
def test_the_guests_complaint_is_mapped(line: str, fault: str, text: str) -> None:
    line, caret = marked(line)
    defined = define(line)
    carrier = defined.carrier()
    theirs = LogEntry("trace_kprobe", text, carrier, carrier.index(fault))
    assert defined.map_entry(theirs) == LogEntry("wprobe", text, line, caret)


def test_caret_beyond_the_end_is_mapped() -> None:
    defined = define("w:ev w@jiffies a=$value")
    assert defined.map_caret(len(defined.carrier())) == len(defined.line)
    assert defined.map_caret(len(defined.carrier()) + 3) == len(defined.line) + 3


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
bodies = st.sampled_from(
    (
        "$addr",
        "$value",
        "$value:x32",
        "+8($addr)",
        "-4(+0($value)):u16",
        "@jiffies",
        "\\7",
        "this_cpu_read($addr)",
        "(task_struct)$addr->pid",
        "(task_struct,tasks)$addr->comm:string",
        "+0((task_struct)$addr->mm):string",
    )
)
specs = st.builds(
    lambda access, place, length: f"{access}@{place}{length}",
    st.sampled_from(["", "r", "w", "rw"]),
    st.sampled_from(["jiffies", "jiffies+8", "jiffies-16", "-1", f"0x{JIFFIES:x}", "foo.isra.0", f"{TASK_SIZE}"]),
    st.sampled_from(["", ":1", ":2", ":0x4", ":010", ":+8"]),
)
good = st.builds(
    lambda head, spec, args: " ".join([head, spec, *args]),
    st.one_of(st.just("w"), st.builds("w:{}".format, names), st.builds("w:{}/{}".format, names, names)),
    specs,
    st.lists(
        st.one_of(bodies, st.builds("{}={}".format, names, bodies)),
        max_size=6,
        unique_by=lambda arg: arg.partition("=")[0],
    ),
).filter(lambda line: "arg" not in line and "common_" not in line)


def essence(defined: Definition) -> tuple[object, ...]:
    args = tuple((arg.name, arg.text, arg.type) for arg in defined.args)
    return (defined.group, defined.event, defined.access, defined.symbol, defined.offset, defined.address,
            defined.dummy, defined.length, args)  # fmt: skip


@given(good)
def test_what_is_shown_defines_the_same_again(line: str) -> None:
    defined = define(line)
    again = define(defined.show())
    assert essence(again) == essence(defined)
    assert again.show() == defined.show()
    assert again.carrier() == defined.carrier()


@given(good)
def test_carets_are_mapped_there_and_back(line: str) -> None:
    defined = define(line)
    carrier = defined.carrier()
    for column in range(len(line) + 4):
        there = defined.carrier_caret(column)
        assert 0 <= there <= len(carrier) + 4
        back = defined.map_caret(there)
        assert back <= column
        assert defined.carrier_caret(back) <= there
    for arg in defined.args:
        for piece in arg.pieces:
            if piece.verbatim:
                for column in range(piece.start, piece.start + piece.typed):
                    there = defined.carrier_caret(column)
                    assert carrier[there] == line[column]
                    assert defined.map_caret(there) == column


@given(texts(*"w:/.@+-()$%=,> rx0148\\", "jiffies", "$addr", "->", "task_struct", "pid", "ev"))
def test_nothing_but_probe_error_is_raised(text: str) -> None:
    for line in (f"w{text}", f"w:ev w@jiffies a={text}", f"w w@{text}"):
        if defined := accepted(define, line):
            assert defined.address >= TASK_SIZE
            assert defined.carrier().startswith(f"p:{defined.group}/{defined.event} emergency_restart")
