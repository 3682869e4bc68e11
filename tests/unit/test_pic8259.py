"""The interrupt controllers, held against the 8259A data sheet."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.pic8259 import Pic8259, PicPair

NON_SPECIFIC_EOI, SPECIFIC_EOI, ROTATE_ON_EOI, SET_PRIORITY = 0x20, 0x60, 0xA0, 0xC0
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SPECIAL_MASK_ON, SPECIAL_MASK_OFF = 0x68, 0x48


def initialised(icw4: int = 0x01) -> PicPair:
    """A pair as Linux sets it up: vectors from 0x30, nothing masked."""
    pair = PicPair()
    for command, base, wiring in ((0x20, 0x30, 0x04), (0xA0, 0x38, 0x02)):
        pair.port_write(command, 1, 0x11)
        for value in (base, wiring, icw4, 0):
            pair.port_write(command + 1, 1, value)
    return pair


def in_service(pair: PicPair, command: int) -> int:
    pair.port_write(command, 1, READ_ISR)
    return pair.port_read(command, 1)


def requests(pair: PicPair, command: int) -> int:
    pair.port_write(command, 1, READ_IRR)
    return pair.port_read(command, 1)


def test_nothing_is_delivered_before_initialisation() -> None:
    pair = PicPair()
    pair.set_line(0, True)
    assert not pair.pending()


def test_an_edge_is_latched_delivered_once_and_ended_by_eoi() -> None:
    pair = initialised()
    pair.set_line(4, True)
    assert requests(pair, 0x20) == 0x10
    assert pair.acknowledge() == 0x34
    assert (requests(pair, 0x20), in_service(pair, 0x20)) == (0, 0x10)
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)
    assert in_service(pair, 0x20) == 0
    assert not pair.pending()  # the line is still high, but that is no edge
    pair.set_line(4, False)
    pair.set_line(4, True)
    assert pair.pending()


def test_lower_lines_have_priority_and_nest() -> None:
    pair = initialised()
    pair.set_line(5, True)
    pair.set_line(3, True)
    assert pair.acknowledge() == 0x33
    assert not pair.pending()  # 5 waits for 3
    pair.set_line(1, True)
    assert pair.acknowledge() == 0x31
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)  # ends the highest in service, 1
    assert in_service(pair, 0x20) == 0x08
    pair.port_write(0x20, 1, SPECIFIC_EOI | 3)
    assert pair.acknowledge() == 0x35


def test_a_masked_line_is_remembered() -> None:
    pair = initialised()
    pair.port_write(0x21, 1, 0x01)
    pair.set_line(0, True)
    assert not pair.pending()
    assert pair.port_read(0x21, 1) == 0x01
    pair.port_write(0x21, 1, 0x00)
    assert pair.acknowledge() == 0x30


def test_a_request_withdrawn_before_the_acknowledge_is_spurious() -> None:
    pair = initialised()
    pair.set_line(3, True)
    pair.set_line(3, False)
    assert pair.acknowledge() == 0x37
    assert in_service(pair, 0x20) == 0  # a default line 7 sets no ISR bit


def test_a_slave_request_withdrawn_in_the_middle_is_spurious_15() -> None:
    pair = initialised()
    pair.set_line(12, True)
    pair.slave.edges = 0  # withdrawn between the two INTA cycles
    assert pair.acknowledge() == 0x3F
    assert in_service(pair, 0x20) == 0x04
    assert in_service(pair, 0xA0) == 0


def test_slave_lines_come_through_line_2() -> None:
    pair = initialised()
    pair.set_line(8, True)
    pair.set_line(3, True)
    assert pair.acknowledge() == 0x38  # line 2 is above line 3
    assert (in_service(pair, 0x20), in_service(pair, 0xA0)) == (0x04, 0x01)
    pair.set_line(14, True)
    pair.port_write(0xA0, 1, NON_SPECIFIC_EOI)
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)
    assert pair.acknowledge() == 0x3E


def test_fully_nested_slaves_let_a_higher_slave_line_interrupt() -> None:
    for icw4, expected in ((0x01, False), (0x11, True)):
        pair = initialised(icw4)
        pair.set_line(14, True)
        pair.acknowledge()
        pair.set_line(9, True)
        assert pair.pending() is expected


def test_two_slave_requests_are_both_delivered_with_automatic_eoi() -> None:
    pair = initialised(icw4=0x03)
    pair.set_line(10, True)
    pair.set_line(11, True)
    assert [pair.acknowledge(), pair.acknowledge()] == [0x3A, 0x3B]
    assert not pair.pending()
    assert in_service(pair, 0xA0) == 0


def test_rotation_puts_the_served_line_last() -> None:
    pair = initialised()
    pair.set_line(0, True)
    pair.acknowledge()
    pair.port_write(0x20, 1, ROTATE_ON_EOI)
    pair.set_line(0, False)
    pair.set_line(0, True)
    pair.set_line(7, True)
    assert pair.acknowledge() == 0x37
    pair.port_write(0x20, 1, SPECIFIC_EOI | 7)
    assert pair.acknowledge() == 0x30


def test_rotation_in_automatic_eoi_mode() -> None:
    pair = initialised(icw4=0x03)
    pair.port_write(0x20, 1, 0x80)
    pair.set_line(1, True)
    pair.acknowledge()
    assert pair.master.lowest == 1
    pair.port_write(0x20, 1, 0x00)
    pair.set_line(4, True)
    pair.acknowledge()
    assert pair.master.lowest == 1


def test_set_priority_command() -> None:
    pair = initialised()
    pair.port_write(0x20, 1, SET_PRIORITY | 4)  # 4 lowest: 5 highest
    pair.set_line(0, True)
    pair.set_line(5, True)
    assert pair.acknowledge() == 0x35


def test_special_mask_mode_lets_lower_lines_through_a_masked_one_in_service() -> None:
    pair = initialised()
    pair.set_line(1, True)
    pair.acknowledge()
    pair.set_line(5, True)
    pair.port_write(0x21, 1, 0x02)
    assert not pair.pending()
    pair.port_write(0x20, 1, SPECIAL_MASK_ON)
    assert pair.acknowledge() == 0x35
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)  # does not see line 1, which is masked
    assert in_service(pair, 0x20) == 0x02
    pair.port_write(0x20, 1, SPECIAL_MASK_OFF)
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)
    assert in_service(pair, 0x20) == 0


def test_poll_acknowledges_in_the_next_read() -> None:
    pair = initialised()
    pair.set_line(6, True)
    pair.port_write(0x20, 1, POLL)
    assert pair.port_read(0x20, 1) == 0x86
    assert in_service(pair, 0x20) == 0x40
    pair.port_write(0x20, 1, POLL)
    assert pair.port_read(0x20, 1) == 0x00


def test_polling_the_slave_lowers_its_request() -> None:
    pair = initialised()
    pair.set_line(9, True)
    assert pair.pending()
    pair.port_write(0xA0, 1, POLL)
    assert pair.port_read(0xA0, 1) == 0x81
    assert not pair.pending()


def test_elcr_makes_a_line_level_triggered() -> None:
    pair = initialised()
    pair.port_write(0x4D0, 1, 0xFF)
    pair.port_write(0x4D1, 1, 0xFF)
    assert (pair.port_read(0x4D0, 1), pair.port_read(0x4D1, 1)) == (0xF8, 0xDE)  # the rest is always edge triggered
    pair.set_line(5, True)
    assert pair.acknowledge() == 0x35
    pair.port_write(0x20, 1, NON_SPECIFIC_EOI)
    assert pair.pending()  # still high
    pair.set_line(5, False)
    assert not pair.pending()


def test_icw1_clears_mask_service_and_edges_but_no_level() -> None:
    pair = initialised()
    pair.set_line(0, True)
    pair.acknowledge()
    pair.set_line(1, True)
    pair.port_write(0x21, 1, 0xFF)
    pair.port_write(0x20, 1, 0x11)
    assert (pair.master.imr, pair.master.isr, pair.master.irr, pair.master.lines) == (0, 0, 0, 0x03)


def test_initialisation_without_icw3_and_icw4() -> None:
    chip = Pic8259()
    chip.write(0, 0x12)  # single, no ICW4
    chip.write(1, 0x47)
    assert (chip.base, chip.next_icw) == (0x40, 0)
    chip.write(1, 0x55)
    assert chip.imr == 0x55


LINES = [line for line in range(16) if line != 2]
steps = st.one_of(
    st.tuples(st.just("line"), st.sampled_from(LINES), st.booleans()),
    st.tuples(st.just("read"), st.sampled_from(PicPair.PORTS), st.just(0)),
    st.tuples(st.just("write"), st.sampled_from(PicPair.PORTS), st.integers(0, 0xFF)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
)


@given(st.lists(steps, max_size=60))
def test_any_use_keeps_the_registers_consistent(sequence: list[tuple[str, int, int]]) -> None:
    pair = PicPair()
    for action, where, value in sequence:
        if action == "line":
            pair.set_line(where, bool(value))
        elif action == "read":
            assert 0 <= pair.port_read(where, 1) <= 0xFF
        elif action == "write":
            pair.port_write(where, 1, value)
        else:
            expected = pair.pending()
            before = pair.master.isr
            vector = pair.acknowledge()
            assert 0 <= vector <= 0xFF
            assert expected or (vector & 7 == 7 and pair.master.isr == before)
        for chip in (pair.master, pair.slave):
            assert chip.irr & ~chip.lines == 0  # only a high line can ask
        assert bool(pair.master.lines & 4) is (pair.slave.requested() is not None)
    state = pair.state()
    copy = PicPair()
    copy.load(json.loads(json.dumps(state)))
    assert copy.state() == state
    assert copy.pending() == pair.pending()
