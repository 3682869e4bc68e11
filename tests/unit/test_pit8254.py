"""The interval timer, held against the 8254 data sheet."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.pit8254 import FREQUENCY, SECOND, Pit8254, pulses, time_of


class Bench:
    """A timer, the virtual clock it looks at and the line it drives."""

    def __init__(self) -> None:
        self.ns = 0
        self.level = False
        self.edges: list[int] = []
        self.pit = Pit8254(lambda: self.ns, self.set_line)

    def set_line(self, level: bool) -> None:
        if level and not self.level:
            self.edges.append(self.ns)
        self.level = level

    def program(self, counter: int, mode: int, count: int, access: int = 3) -> None:
        self.pit.port_write(0x43, 1, counter << 6 | access << 4 | mode << 1)
        if access & 1:
            self.pit.port_write(0x40 + counter, 1, count & 0xFF)
        if access & 2:
            self.pit.port_write(0x40 + counter, 1, count >> 8)

    def at(self, pulse: int) -> None:
        self.ns = time_of(pulse)
        self.pit.advance(self.ns)

    def value(self, counter: int) -> int:
        self.pit.port_write(0x43, 1, counter << 6)
        low = self.pit.port_read(0x40 + counter, 1)
        return low | self.pit.port_read(0x40 + counter, 1) << 8

    def status(self, counter: int) -> int:
        self.pit.port_write(0x43, 1, 0xE0 | 2 << counter)
        return self.pit.port_read(0x40 + counter, 1)

    def run(self, until_ns: int) -> None:
        while (event := self.pit.next_event()) is not None and event <= until_ns:
            self.ns = event
            self.pit.advance(event)
        self.ns = until_ns


@given(st.integers(0, 1 << 60))
def test_the_first_moment_of_a_pulse(pulse: int) -> None:
    assert pulses(time_of(pulse)) == pulse
    assert pulse == 0 or pulses(time_of(pulse) - 1) == pulse - 1


def test_an_unprogrammed_timer_is_silent() -> None:
    bench = Bench()
    assert bench.pit.next_event() is None
    bench.pit.advance(10 * SECOND)
    assert not bench.edges


def test_mode_0_raises_out_n_plus_1_pulses_after_the_count() -> None:
    bench = Bench()
    bench.program(0, 0, 1000)
    assert bench.pit.next_event() == time_of(1001)
    assert bench.status(0) & 0x80 == 0
    bench.at(1000)
    assert bench.status(0) & 0x80 == 0
    bench.at(1001)
    assert bench.status(0) & 0x80
    assert bench.edges == [time_of(1001)]
    assert bench.level  # stays high until it is programmed again
    assert bench.pit.next_event() is None
    bench.program(0, 0, 5)
    assert not bench.level


def test_mode_0_counts_down_and_wraps() -> None:
    bench = Bench()
    bench.program(0, 0, 10)
    bench.at(1)
    assert bench.value(0) == 10
    bench.at(4)
    assert bench.value(0) == 7
    bench.at(12)
    assert bench.value(0) == 0xFFFF


def test_mode_0_first_byte_stops_the_count() -> None:
    bench = Bench()
    bench.program(0, 0, 100)
    bench.at(50)
    bench.pit.port_write(0x40, 1, 10)
    assert bench.pit.next_event() is None
    bench.pit.port_write(0x40, 1, 0)
    assert bench.pit.next_event() == time_of(61)


def test_mode_2_is_periodic_without_drift() -> None:
    bench = Bench()
    bench.program(0, 2, 4773)  # Linux's HZ=250
    bench.run(100 * SECOND)
    count = (pulses(100 * SECOND) - 1) // 4773
    assert bench.edges == [time_of(1 + 4773 * index) for index in range(1, count + 1)]


def test_mode_2_pulls_out_low_for_the_last_pulse() -> None:
    bench = Bench()
    bench.program(0, 2, 4)
    levels, values = [], []
    for pulse in range(1, 9):
        bench.at(pulse)
        levels.append(bench.status(0) >> 7)
        values.append(bench.value(0))
    assert values == [4, 3, 2, 1, 4, 3, 2, 1]
    assert levels == [1, 1, 1, 0, 1, 1, 1, 0]


def test_missed_periods_collapse_and_keep_the_phase() -> None:
    bench = Bench()
    bench.program(0, 2, 1000)
    bench.at(1 + 7500)
    assert len(bench.edges) == 1
    assert bench.pit.next_event() == time_of(1 + 8000)


def test_mode_2_takes_a_new_count_at_the_end_of_the_cycle() -> None:
    bench = Bench()
    bench.program(0, 2, 1000)
    bench.at(500)
    bench.pit.port_write(0x40, 1, 200)
    bench.pit.port_write(0x40, 1, 0)
    assert bench.status(0) & 0x40  # null count: not loaded yet
    bench.run(time_of(1450))
    assert bench.edges == [time_of(1001), time_of(1201), time_of(1401)]
    assert bench.status(0) & 0x40 == 0


@pytest.mark.parametrize(
    ("count", "values", "levels"),
    [
        (6, [6, 4, 2, 6, 4, 2], [1, 1, 1, 0, 0, 0]),
        (5, [4, 2, 0, 4, 2], [1, 1, 1, 0, 0]),  # odd: high for (N+1)/2, low for (N-1)/2
    ],
)
def test_mode_3_is_a_square_wave(count: int, values: list[int], levels: list[int]) -> None:
    bench = Bench()
    bench.program(0, 3, count)
    seen = []
    for pulse in range(1, 1 + count):
        bench.at(pulse)
        seen.append((bench.value(0), bench.status(0) >> 7))
    assert seen == list(zip(values, levels, strict=True))
    assert bench.pit.next_event() == time_of(1 + count)


def test_mode_4_strobes_once() -> None:
    bench = Bench()
    bench.program(0, 4, 100)
    assert bench.pit.next_event() == time_of(102)  # low at N+1, one pulse long: the rising edge ends it
    bench.at(101)
    assert bench.status(0) & 0x80 == 0
    bench.run(time_of(10000))
    assert bench.edges == [time_of(102)]


def test_leaving_mode_0_before_its_end_raises_the_line() -> None:
    bench = Bench()
    bench.program(0, 0, 100)
    bench.at(10)
    bench.pit.port_write(0x43, 1, 0x34)
    assert bench.edges == [bench.ns]  # OUT is high at once in mode 2


def test_a_count_of_zero_is_65536() -> None:
    bench = Bench()
    bench.program(0, 2, 0)
    assert bench.pit.next_event() == time_of(1 + 65536)


@pytest.mark.parametrize(("access", "written", "count"), [(1, 0x64, 0x64), (2, 0x64, 0x6400)])
def test_one_byte_access(access: int, written: int, count: int) -> None:
    bench = Bench()
    bench.pit.port_write(0x43, 1, access << 4 | 2 << 1)
    bench.pit.port_write(0x40, 1, written)
    assert bench.pit.next_event() == time_of(1 + count)
    assert bench.pit.port_read(0x40, 1) == written


def test_latch_holds_the_count_until_it_is_read() -> None:
    bench = Bench()
    bench.program(0, 2, 10000)
    bench.at(1)
    bench.pit.port_write(0x43, 1, 0x00)
    bench.at(500)
    bench.pit.port_write(0x43, 1, 0x00)  # ignored: the first is unread
    assert bench.pit.port_read(0x40, 1) | bench.pit.port_read(0x40, 1) << 8 == 10000
    assert bench.pit.port_read(0x40, 1) | bench.pit.port_read(0x40, 1) << 8 == 10000 - 499


def test_read_back_gives_status_then_count() -> None:
    bench = Bench()
    bench.program(0, 2, 10000)
    bench.at(101)
    bench.pit.port_write(0x43, 1, 0xC2)  # both, of counter 0
    bench.at(200)
    assert bench.pit.port_read(0x40, 1) == 0xB4  # OUT high, loaded, both bytes, mode 2, binary
    assert bench.pit.port_read(0x40, 1) | bench.pit.port_read(0x40, 1) << 8 == 9900


def test_modes_6_and_7_are_2_and_3() -> None:
    bench = Bench()
    for written, mode in ((6, 2), (7, 3)):
        bench.program(0, written, 100)
        assert bench.status(0) >> 1 & 7 == mode


def test_gate_2_pauses_mode_0() -> None:
    bench = Bench()
    bench.program(2, 0, 1000)
    bench.at(400)
    assert bench.value(2) == 1000
    bench.pit.set_gate2(True)
    bench.at(700)
    assert bench.value(2) == 700
    bench.pit.set_gate2(False)
    bench.at(900)
    assert bench.value(2) == 700
    bench.pit.set_gate2(True)
    bench.at(1599)
    assert not bench.pit.out2()
    bench.at(1600)
    assert bench.pit.out2()


def test_gate_2_stops_and_restarts_mode_2() -> None:
    bench = Bench()
    bench.pit.set_gate2(True)
    bench.program(2, 2, 100)
    bench.at(40)
    bench.pit.set_gate2(False)
    assert bench.pit.out2()
    bench.at(60)
    assert bench.value(2) == 100 - 39
    bench.pit.set_gate2(True)
    bench.at(61)
    assert bench.value(2) == 100


def test_gate_2_triggers_mode_1() -> None:
    bench = Bench()
    bench.program(2, 1, 50)
    bench.at(10)
    assert bench.pit.out2()
    bench.pit.set_gate2(True)
    bench.at(11)
    assert not bench.pit.out2()
    bench.at(60)
    assert not bench.pit.out2()
    bench.at(61)
    assert bench.pit.out2()
    bench.pit.set_gate2(False)
    bench.pit.set_gate2(True)  # retriggers with the same count
    bench.at(62)
    assert not bench.pit.out2()


def test_frequency() -> None:
    assert abs(FREQUENCY - 315_000_000 / 88 / 3) < 1


pokes = st.one_of(
    st.tuples(st.just("write"), st.integers(0x40, 0x43), st.integers(0, 0xFF)),
    st.tuples(st.just("read"), st.integers(0x40, 0x43), st.just(0)),
    st.tuples(st.just("gate"), st.booleans(), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 200_000_000), st.just(0)),
)


@given(st.lists(pokes, max_size=40))
def test_any_use_keeps_it_alive_and_restorable(sequence: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    for action, where, value in sequence:
        if action == "write":
            bench.pit.port_write(where, 1, value)
        elif action == "read":
            assert 0 <= bench.pit.port_read(where, 1) <= 0xFF
        elif action == "gate":
            bench.pit.set_gate2(bool(where))
        else:
            bench.ns += where
            bench.pit.advance(bench.ns)
            event = bench.pit.next_event()
            assert event is None or event > bench.ns
        assert bench.pit.out2() in (True, False)
    state = bench.pit.state()
    copy = Bench()
    copy.ns = bench.ns
    copy.pit.load(json.loads(json.dumps(state)))
    assert copy.pit.state() == state
    assert copy.pit.next_event() == bench.pit.next_event()
    assert copy.value(0) == bench.value(0)
