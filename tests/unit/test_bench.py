"""The benchmark's table, its JSON and what it makes of QEMU's markers; nothing is measured here."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import Figure
from bench.qemu import Span, Stamp, parse_markers, script, values
from bench.run import MEASUREMENTS, Result, number, selected, table, to_json

LOW = Figure("low", "a time", "ms", 0.5)
HIGH = Figure("high", "a rate", "/s", 200_000, more_is_better=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (12.345, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (247592.3, "247,592"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_reached() -> None:
    assert Result(LOW, 0.5).reached
    assert not Result(LOW, 0.51).reached
    assert Result(HIGH, 200_000).reached
    assert not Result(HIGH, 199_999).reached
    assert not Result(LOW, None, "no kernel").reached


def test_table_without_qemu() -> None:
    assert table([Result(LOW, 0.25), Result(HIGH, 1000)]).splitlines() == [
        "figure  value  target         reached",
        "a time  0.250  <= 0.5 ms      yes",
        "a rate  1,000  >= 200,000 /s  no",
    ]


def test_table_with_qemu_and_a_failure() -> None:
    lines = table([Result(LOW, None, "3 hits missed"), Result(HIGH, 250_000, qemu=1234.5)]).splitlines()
    assert lines[0].endswith("QEMU TCG")
    assert "no (3 hits missed)" in lines[1]
    assert lines[1].endswith("-")
    assert lines[2].endswith("1,234")
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_json() -> None:
    assert json.loads(to_json([Result(LOW, None), Result(HIGH, 3.0, qemu=2.0)])) == [
        {"figure": "a time", "value": None, "unit": "ms", "target": 0.5, "reached": False},
        {"figure": "a rate", "value": 3.0, "unit": "/s", "target": 200_000, "reached": False, "qemu": 2.0},
    ]


def test_only_selects_by_key_or_name() -> None:
    assert selected("") == list(MEASUREMENTS)
    assert [measurement.figures[0].key for measurement in selected("trace_pipe|^idle$")] == ["drain", "idle"]
    assert selected("no such figure") == []


def test_keys_are_unique() -> None:
    keys = [figure.key for measurement in MEASUREMENTS for figure in measurement.figures]
    assert len(keys) == len(set(keys))


def stamped(*lines: str) -> list[tuple[Stamp, str]]:
    return [(Stamp(float(index), index / 10), line) for index, line in enumerate(lines)]


def test_markers() -> None:
    spans = parse_markers(
        stamped(
            "@bench begin boot",
            "[    0.1] the kernel says something",
            "@bench end boot 1\r",
            "@bench begin drain",
            "[    1.5] no newline before a marker@bench end drain 5000",
            "@bench end never_begun 1",
            "@bench begin never_ended",
        )
    )
    assert set(spans) == {"boot", "drain"}
    assert spans["boot"].wall == 2
    assert spans["boot"].cpu == pytest.approx(0.2)
    assert spans["drain"].count == 5000


def test_values_have_the_figures_units() -> None:
    found = values(
        {
            "boot": Span(9, 4, 1),
            "small_read": Span(2, 2, 1000),
            "drain": Span(2, 2, 1000),
            "idle": Span(10, 0.1, 1),
            "nop": Span(3, 3, 1),
            "walk": Span(0, 0, 1),
        }
    )
    assert found == pytest.approx({"boot": 4, "small_read": 2, "drain": 500, "idle": 1, "nop": 3})


@given(st.lists(st.text()))
def test_any_output_is_taken(lines: list[str]) -> None:
    values(parse_markers(stamped(*lines)))


@pytest.mark.parametrize("quick", [False, True])
def test_script_measures_what_has_a_figure(quick: bool) -> None:
    text = script(quick=quick)
    assert "@READS@" not in text
    keys = {figure.key for measurement in MEASUREMENTS for figure in measurement.figures}
    begun = {word for line in text.splitlines() if line.startswith("begin ") for word in line.split()[1:2]}
    assert {name.strip(";") for name in begun} <= keys
