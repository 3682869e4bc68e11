from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe.commands import Removal, is_wprobe, lines, parse_removal
from fakefs.wprobe.definition import Definition, parse
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.kstrto import kstrtoint, kstrtol, kstrtoul, split_words


class Kernel:
    dummy = 0xFFFFFFFF820F8940

    def lookup(self, name: str) -> int | None:
        return 0xFFFFFFFF81C07A00


def define(line: str) -> Definition:
    return parse(line, Kernel())


def test_lines_of_a_write() -> None:
    assert list(lines(b"# comment\nw:ev1 w@jiffies # trailing\n\n-:ev1")) == ["", "w:ev1 w@jiffies ", "", "-:ev1"]
    assert list(lines(b"")) == []


def test_lines_before_one_too_long_are_given() -> None:
    written = lines(b"w:a w@b\n" + b"x" * 4096)
    assert next(written) == "w:a w@b"
    with pytest.raises(ProbeError) as caught:
        next(written)
    assert (caught.value.number, caught.value.entry) == (errno.EINVAL, None)


@pytest.mark.parametrize("length", [4094, 4095])
def test_longest_line(length: int) -> None:
    line = b"x" * length
    assert list(lines(line)) == [line.decode()]
    newline = lines(line + b"\n")
    if length == 4094:
        assert list(newline) == [line.decode()]
    else:
        with pytest.raises(ProbeError):
            list(newline)


@given(st.lists(st.binary(max_size=300).map(lambda line: line.translate(None, b"\n#\0")), max_size=60))
def test_lines_come_whole_whatever_the_buffer(written: list[bytes]) -> None:
    assert list(lines(b"".join(line + b"\n" for line in written))) == [line.decode("latin-1") for line in written]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("w", True),
        (" w:ev w@x", True),
        ("wx:ev", True),
        ("W:ev", False),
        ("p:ev f", False),
        ("-w:ev", False),
        ("!w:ev w@x", False),
        ("", False),
        (" ", False),
    ],
)
def test_which_lines_are_for_wprobes(line: str, expected: bool) -> None:
    assert is_wprobe(line) is expected


@pytest.mark.parametrize(
    ("line", "removal"),
    [
        ("-:ev", Removal(None, "ev", ())),
        ("-:grp/ev a=$addr", Removal("grp", "ev", ("a=$addr",))),
        ("-:grp/", Removal("grp", "", ())),
        ("!w:ev w@jiffies", Removal(None, "ev", ("w@jiffies",))),
        ("!:ev", Removal(None, "ev", ())),
        (" -:ev", None),
        ("w:ev w@jiffies", None),
        ("", None),
    ],
)
def test_removal(line: str, removal: Removal | None) -> None:
    assert parse_removal(line) == removal


@pytest.mark.parametrize("line", ["-", "-w:ev", "-:", "!", "!w", "!w:", "- :ev"])
def test_bad_removal(line: str) -> None:
    with pytest.raises(ProbeError) as caught:
        parse_removal(line)
    assert (caught.value.number, caught.value.entry) == (errno.EINVAL, None)


@pytest.mark.parametrize(
    ("line", "matches"),
    [
        ("-:ev", True),
        ("-:grp/ev", True),
        ("-:grp/", True),
        ("-:wprobes/ev", False),
        ("-:other", False),
        ("-:ev value=+0($addr)", True),
        ("-:ev value=+0($addr) arg2=$addr", True),
        ("-:ev value=+0($addr) $addr", False),
        ("-:ev arg2=$addr", False),
        ("-:ev value=+0($addr) arg2=$addr c=$addr", False),
    ],
)
def test_removal_matches(line: str, matches: bool) -> None:
    removal = parse_removal(line)
    assert removal
    assert removal.matches(define("w:grp/ev w@jiffies:8 value=+0($addr) $addr")) is matches


@given(st.sampled_from("-!").flatmap(lambda first: st.text(st.characters(codec="latin-1")).map(first.__add__)))
def test_any_removal_is_parsed_or_refused(line: str) -> None:
    parsed: Removal | ProbeError | None
    try:
        parsed = parse_removal(line)
    except ProbeError as error:
        parsed = error
    assert parsed is not None


def test_words() -> None:
    assert split_words(" w:ev \t w@jiffies\xa0a\n") == ["w:ev", "w@jiffies", "a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("010", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", None),
        ("", None),
        ("0x", None),
        ("08", None),
        ("-1", None),
        ("++1", None),
        ("1 ", None),
        ("1_0", None),
        ("\u0661", None),
    ],
)
def test_kstrtoul(text: str, value: int | None) -> None:
    assert kstrtoul(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-0x10", -16),
        ("+8", 8),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", None),
        ("-+4", None),
        ("+-4", None),
        ("-", None),
    ],
)
def test_kstrtol(text: str, value: int | None) -> None:
    assert kstrtol(text) == value


def test_kstrtoint() -> None:
    assert kstrtoint("-2147483648") == -(2**31)
    assert kstrtoint("2147483648") is None
