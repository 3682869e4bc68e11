"""The trace parser: lines as kernels print them, and that whatever is printed is read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.records import Record, Value, parse, parse_line, to_fields, to_value

TRACE = """\
# tracer: nop
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
CPU:0 [LOST 12 EVENTS]
             cat-25327   [000] .....     1.631280: reads: (vfs_read+0x4/0x370) count=0x9800 name="a b=c"
             cat-25327   [000] .....     1.631290: back: (ksys_read+0x6d/0xf0 <- vfs_read) ret=-14
          <idle>-0       [000] d..2.     3.712441: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 \
prev_state=R ==> next_comm=kworker/0:1 next_pid=11 next_prio=120
     kworker/0:1-11      [000] d..2.     3.712446: <stack trace>
 => __schedule
 => schedule
           <...>-9124    [000] .....     1.388435: tracing_mark_write: hello
"""


def test_a_trace() -> None:
    reads, back, switch, mark = parse(TRACE)
    assert (reads.task, reads.pid, reads.cpu, reads.flags, reads.timestamp) == ("cat", 25327, 0, ".....", 1.63128)
    assert (reads.event, reads.ip, reads.func) == ("reads", "vfs_read+0x4/0x370", "vfs_read")
    assert reads.fields == {"count": 0x9800, "name": "a b=c"}
    assert (back.ip, back.func, back.fields) == ("ksys_read+0x6d/0xf0", "vfs_read", {"ret": -14})
    assert switch.fields["prev_state"] == "R"
    assert switch.fields["next_comm"] == "kworker/0:1"
    assert switch.stack == ("__schedule", "schedule")
    assert (mark.task, mark.text, mark.fields) == ("<...>", "hello", {})


@pytest.mark.parametrize(
    ("rest", "event", "func", "fields"),
    [
        ("sys_openat(dfd: ffffff9c, flags: 0)", "sys_enter_openat", "", {"dfd": 0xFFFFFF9C, "flags": 0}),
        ("sys_openat -> 0x3", "sys_exit_openat", "", {"ret": 3}),
        ("sys_sync()", "sys_enter_sync", "", {}),
        ("vfs_read <-ksys_read", "function", "vfs_read", {"parent": "ksys_read"}),
        ("vfs_read(file=0xff, count=1) <-ksys_read", "function", "vfs_read", {"parent": "ksys_read"}),
        ("e: (f+0x1/0x2 [mod]) a={1,0x2}", "e", "f", {"a": [1, 2]}),
        ("e: (0xffffffff81000000) a=0x1", "e", "0xffffffff81000000", {"a": 1}),
        ("e: (f+0x1/0x2)", "e", "f", {}),
        ("e:", "e", "", {}),
    ],
)
def test_bodies(rest: str, event: str, func: str, fields: dict[str, Value]) -> None:
    record = parse_line(f"  cat-1       [000] .....     1.0: {rest}")
    assert record is not None
    assert (record.event, record.func, record.fields) == (event, func, fields)


@pytest.mark.parametrize(
    ("line", "tgid", "flags", "timestamp"),
    [
        ("             cat-7       (      5) [001] .....     1.5: e: ", 5, ".....", 1.5),
        ("             cat-7       (-------) [001] .....     1.5: e: ", None, ".....", 1.5),
        ("             cat-7       [001]     1.5: e: ", None, "", 1.5),
        ("             cat-7       [001] d.h1. 4021: e: ", None, "d.h1.", 4021.0),
        ("cat-7 [001] d.h1. 4021: e: ", None, "d.h1.", 4021.0),
    ],
)
def test_header_options(line: str, tgid: int | None, flags: str, timestamp: float) -> None:
    record = parse_line(line)
    assert record is not None
    assert (record.task, record.pid, record.cpu) == ("cat", 7, 1)
    assert (record.tgid, record.flags, record.timestamp) == (tgid, flags, timestamp)


@pytest.mark.parametrize("text", ["007", "0000000000001234", "0x", "-", "", "1.5", "{1,a}", "{}", "R+"])
def test_text_that_is_no_number(text: str) -> None:
    assert to_value(text) == text


COMM = st.text(st.characters(min_codepoint=33, max_codepoint=126) | st.just(" "), min_size=1, max_size=15).filter(
    lambda comm: comm == comm.strip(" ")
)
NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True)
PRINTED: st.SearchStrategy[tuple[str, Value]] = st.one_of(
    st.integers(-(2**63), 2**63).map(lambda value: (str(value), value)),
    st.integers(0, 2**64).map(lambda value: (hex(value), value)),
    st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"='), max_size=20).map(
        lambda text: (f'"{text}"', text)
    ),
    st.lists(st.integers(0, 255), min_size=1, max_size=5).map(
        lambda items: ("{" + ",".join(map(hex, items)) + "}", items)
    ),
)


@given(
    COMM,
    st.integers(0, 4194304),
    st.integers(0, 999),
    st.text("dDNnpbhHzZs.1234", min_size=5, max_size=5),
    st.integers(0, 10**15),
    NAME,
    st.dictionaries(NAME, PRINTED, max_size=5),
)
def test_what_a_kprobe_prints_is_read_back(
    comm: str, pid: int, cpu: int, flags: str, time: int, event: str, printed: dict[str, tuple[str, Value]]
) -> None:
    stamp = f"{time // 10**6}.{time % 10**6:06}"
    fields = "".join(f" {name}={text}" for name, (text, _) in printed.items())
    text = f"(vfs_read+0x4/0x370){fields}"
    [record] = parse(f"{comm:>16}-{pid:<7} [{cpu:03}] {flags} {stamp:>12}: {event}: {text}\n")
    expected = {name: value for name, (_, value) in printed.items()}
    assert record == Record(
        comm, pid, cpu, flags, float(stamp), event, text, "vfs_read+0x4/0x370", "vfs_read", expected
    )


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    parse(text)
    to_fields(text)
    to_value(text)


@given(st.text(st.characters(exclude_characters="\n")))
def test_any_body_is_survived(text: str) -> None:
    record = parse_line(f"             cat-7       [001] .....     1.5: {text}")
    assert record is not None
