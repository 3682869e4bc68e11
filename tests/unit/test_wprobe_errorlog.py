from __future__ import annotations

import errno

from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe.errorlog import KEPT, ErrorLog, Logged, parse, render_entry
from fakefs.wprobe.errors import LogEntry, ProbeError

PRINTED = """\
[   14.268094] wprobe: error: Bad memory access type
  Command: w a@symbol
             ^
"""
ENTRY = LogEntry("wprobe", "Bad memory access type", "w a@symbol", 2)

words = st.text(st.characters(codec="ascii", exclude_characters="\n", categories=["L", "N", "P", "S"]), min_size=1)
entries = st.builds(
    LogEntry,
    words.filter(lambda text: ": error: " not in text),
    words,
    words.filter(lambda text: text.strip(" ^")),
    st.integers(0, 300),
)
logged = st.builds(Logged, st.integers(0, 10**13), entries)


def test_entry_is_printed_as_the_kernel_does() -> None:
    assert render_entry(Logged(14268094, ENTRY)) == PRINTED
    assert parse(PRINTED) == [Logged(14268094, ENTRY)]
    assert parse(PRINTED)[0].timestamp == 14.268094


def test_subsystem_may_have_colons_and_blanks() -> None:
    theirs = "[  1.000000] hist:sched:sched_wakeup: error: Couldn't find field\n  Command: keys=x\n           ^\n"
    assert parse(theirs)[0].entry.subsystem == "hist:sched:sched_wakeup"
    theirs = "[  1.000000] event filter parse error: error: Field not found\n  Command: nosuch > 16\n           ^\n"
    assert parse(theirs)[0].entry == LogEntry("event filter parse error", "Field not found", "nosuch > 16", 0)


def test_ours_go_between_the_guests() -> None:
    log = ErrorLog()
    ours = LogEntry("wprobe", "ours", "w", 0)
    log.add(ours, 15_000_000)
    guest = PRINTED + PRINTED.replace("14.268094", "16.000001")
    assert [each.entry for each in parse(log.render(guest))] == [ENTRY, ours, ENTRY]


def test_eight_are_kept() -> None:
    log = ErrorLog()
    for second in range(10):
        log.add(LogEntry("wprobe", "text", f"w {second}", 0), second * 1_000_000)
    guest = "".join(render_entry(Logged(second * 1_000_000 + 1, ENTRY)) for second in range(5, 10))
    shown = parse(log.render(guest))
    assert len(shown) == KEPT == 8
    assert shown == sorted(shown)
    assert shown[0].micros == 6_000_000


def test_adopted_entry_is_shown_in_our_words() -> None:
    log = ErrorLog()
    theirs = Logged(1, LogEntry("trace_kprobe", "Unknown type is specified", "p:w/e f a=+0(%orig_ax):foo", 24))
    ours = LogEntry("wprobe", "Unknown type is specified", "w:e w@x a=$value:foo", 17)
    log.adopt(theirs, ours)
    assert log.render(render_entry(theirs)) == render_entry(Logged(1, ours))
    log.clear()
    assert log.render(render_entry(theirs)) == render_entry(theirs)


def test_adopted_entries_are_forgotten_with_the_guests() -> None:
    log = ErrorLog()
    many = [Logged(number, LogEntry("trace_kprobe", "text", "p", 0)) for number in range(20)]
    for each in many:
        log.adopt(each, ENTRY)
    shown = parse(log.render("".join(map(render_entry, many))))
    assert [each.entry for each in shown] == [ENTRY] * KEPT


def test_probe_error_says_what_happened() -> None:
    assert str(ProbeError(errno.EINVAL, ENTRY)) == "[Errno 22] Bad memory access type"
    assert str(ProbeError(errno.ENOSPC)) == "[Errno 28] No space left on device"


@given(st.lists(logged, max_size=KEPT))
def test_what_is_printed_is_parsed_again(made: list[Logged]) -> None:
    assert parse("".join(map(render_entry, made))) == made


@given(st.text(max_size=200))
def test_any_text_is_parsed(text: str) -> None:
    ErrorLog().render(text)
