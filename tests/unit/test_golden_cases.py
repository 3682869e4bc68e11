"""The format of the transcripts in tests/mount/golden, and what counts as the same answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mount.golden_cases import Case, NotATranscript, alike, errnos, load, parse, same, statuses, write

TEXT = """\
=== b-kprobe/001-simple
--- cmd
echo x > kprobe_events
echo "rc=$?"
--- out
rc=0
 bash-<PID> [<CPU>] ...1. <TS>: mark: a b
--- exit: 0

=== a-files/002-no-newline
--- cmd
printf x
--- out
x
--- nonl: 1
--- exit: 3

"""


def test_a_file_of_two_cases() -> None:
    first, second = parse(TEXT)
    assert first.name == "b-kprobe/001-simple"
    assert first.cmd == 'echo x > kprobe_events\necho "rc=$?"'
    assert first.out == "rc=0\n bash-<PID> [<CPU>] ...1. <TS>: mark: a b\n"
    assert (second.out, second.exit) == ("x", 3)
    assert write(first) + write(second) == TEXT


_WORDS = st.text("ab <>-=\n\té#", max_size=60).filter(
    lambda text: "\n---" not in "\n" + text and "\n===" not in "\n" + text
)
_CASES = st.builds(
    Case,
    name=st.from_regex(r"[a-z-]{1,9}/[0-9]{3}-[\w.+-]{1,20}", fullmatch=True).filter(str.isascii),
    cmd=_WORDS,
    out=_WORDS,
    exit=st.integers(0, 255),
)


@given(cases=st.lists(_CASES, max_size=4))
def test_what_is_written_is_read(cases: list[Case]) -> None:
    assert list(parse("".join(map(write, cases)))) == cases


@pytest.mark.parametrize(
    "text", ["x", "=== a/1\n", "=== a/1\n--- cmd\nx\n", "=== no name\n--- cmd\n\n--- out\n--- exit: 0\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(NotATranscript):
        list(parse(text))


@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(NotATranscript):
        list(parse(text))


CASE = Case("x/1-y", "", "<...>-<PID> [<CPU>] ...1. <TS>: mark: a\n[<TS>] error: no\nat <HEX>+4  #P:2\nrc=1\n", 0)
ANSWER = "            cat-4711  [000] ...1.     1.5: mark: a\n[    2.25] error: no\nat ffff8000+4 #P:1\nrc=1\n"


def test_fields_stand_for_what_differs_from_run_to_run() -> None:
    assert same(CASE, ANSWER, 0) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mark: a", "mark: b"),
        ("cat-4711", "cat-x"),
        ("rc=1", "rc=2"),
        ("rc=1\n", "rc=1"),
        ("+4", "+5"),
        ("...1.", "..1."),
    ],
)
def test_everything_else_must_be_equal(old: str, new: str) -> None:
    assert same(CASE, ANSWER.replace(old, new), 0)
    assert same(CASE, ANSWER, 1)


def test_blanks_count_where_there_is_no_field() -> None:
    case = replace(CASE, out="a  b\n")
    assert same(case, "a  b\n", 0) is None
    assert same(case, "a b\n", 0)


def test_the_shape_is_status_errors_and_statuses() -> None:
    case = Case("x/1-y", "", "bash: x: No such file or directory\nrc=1\n[10] rc=0 7\n", 0)
    assert case.errnos == ["ENOENT"]
    assert alike(case, "bash: anything: No such file or directory\nother\nrc=1\n[99] rc=0\n", 0) is None
    assert alike(case, "bash: x: Invalid argument\nrc=1\nrc=0\n", 0)
    assert alike(case, case.out.replace("rc=1", "rc=0"), 0)
    assert alike(case, case.out, 1)


def test_errors_and_statuses_in_order() -> None:
    text = "a: Device or resource busy\nrc=1\nb: File exists\n[x] rc=17 y\n"
    assert errnos(text) == ["EBUSY", "EEXIST"]
    assert statuses(text) == ["1", "17"]


def test_the_committed_transcripts_agree_with_themselves() -> None:
    cases = load()
    assert len(cases) > 120
    assert all(alike(case, case.out, case.exit) is None for case in cases)
