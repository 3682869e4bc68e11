"""The serial port, held against the PC16550D data sheet."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.uart8250 import BACKLOG_MAX, FIFO_SIZE, Uart8250

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(0x3F8, 0x400)
FCR = IIR
ON_THE_BUS = 0x0B  # DTR, RTS and OUT2, which connects the interrupt


class Bench:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.level = False
        self.rises = 0
        self.uart = Uart8250(self.sent.append, self.set_line)
        self.uart.port_write(MCR, 1, ON_THE_BUS)

    def set_line(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level

    def read(self, port: int) -> int:
        return self.uart.port_read(port, 1)

    def write(self, port: int, value: int) -> None:
        self.uart.port_write(port, 1, value)


def test_bytes_written_are_sent_and_the_transmitter_stays_empty() -> None:
    bench = Bench()
    for byte in b"hello":
        assert bench.read(LSR) == 0x60
        bench.write(DATA, byte)
    assert bench.sent == b"hello"


def test_divisor_latch() -> None:
    bench = Bench()
    bench.write(LCR, 0x83)
    bench.write(DATA, 0x0C)
    bench.write(IER, 0x01)
    assert bench.uart.divisor == 0x010C
    assert (bench.read(DATA), bench.read(IER)) == (0x0C, 0x01)
    bench.write(LCR, 0x03)
    assert bench.read(IER) == 0
    assert bench.sent == b""


def test_enabling_the_transmit_interrupt_asks_at_once_and_reading_iir_answers() -> None:
    bench = Bench()
    assert bench.read(IIR) == 0x01
    bench.write(IER, 0x02)
    assert bench.level
    assert bench.read(IIR) == 0x02
    assert not bench.level
    assert bench.read(IIR) == 0x01
    bench.write(IER, 0x02)  # it was enabled: no new request
    assert not bench.level
    bench.write(IER, 0x00)
    bench.write(IER, 0x02)
    assert bench.level


def test_each_byte_sent_is_a_new_edge_of_the_line() -> None:
    bench = Bench()
    bench.write(IER, 0x02)
    bench.write(DATA, 0x41)
    bench.write(DATA, 0x42)
    assert bench.rises == 3


def test_another_source_in_iir_leaves_the_transmit_interrupt_pending() -> None:
    bench = Bench()
    bench.write(IER, 0x03)
    bench.uart.feed(b"x")
    assert bench.read(IIR) == 0x04
    assert bench.read(DATA) == ord("x")
    assert bench.read(IIR) == 0x02


def test_received_bytes_without_fifo_come_one_by_one() -> None:
    bench = Bench()
    bench.write(IER, 0x01)
    assert bench.uart.feed(b"abc") == 3
    got = bytearray()
    while bench.read(LSR) & 0x01:
        assert bench.level
        got.append(bench.read(DATA))
    assert got == b"abc"
    assert not bench.level


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_fifo_trigger_level(fcr: int, trigger: int) -> None:
    bench = Bench()
    bench.write(FCR, fcr)
    bench.write(IER, 0x01)
    bench.uart.feed(bytes(trigger - 1))
    assert bench.read(IIR) == (0xCC if trigger > 1 else 0xC1)  # time-out: fewer than the trigger level
    bench.uart.feed(b"\0")
    assert bench.read(IIR) == 0xC4


def test_clearing_the_receiver_keeps_what_is_still_on_the_wire() -> None:
    bench = Bench()
    bench.write(FCR, 0x01)
    bench.uart.feed(bytes(range(FIFO_SIZE + 2)))
    bench.write(FCR, 0x03)
    assert [bench.read(DATA), bench.read(DATA)] == [FIFO_SIZE, FIFO_SIZE + 1]
    assert bench.read(LSR) & 0x01 == 0


def test_fcr_bits_other_than_enable_need_enable() -> None:
    bench = Bench()
    bench.write(FCR, 0xC1)
    bench.write(FCR, 0x00)
    assert bench.uart.trigger == 14
    assert bench.read(IIR) == 0x01
    bench.write(FCR, 0x40)
    assert bench.uart.trigger == 14


def test_feed_takes_what_fits() -> None:
    bench = Bench()
    assert bench.uart.feed(bytes(BACKLOG_MAX + 100)) == BACKLOG_MAX
    assert bench.uart.feed(b"abc") == 1  # one byte has moved into the receiver
    assert bench.uart.feed(b"abc") == 0


def test_loopback_of_data_and_modem_lines() -> None:
    bench = Bench()
    bench.read(MSR)
    bench.write(MCR, 0x1A)  # loop, OUT2, RTS: as Linux probes
    assert bench.read(MSR) & 0xF0 == 0x90
    bench.write(IER, 0x01)
    bench.write(DATA, 0x5A)
    assert bench.sent == b""
    assert bench.read(IIR) == 0x04
    assert not bench.level  # OUT2 is held inactive
    assert bench.read(DATA) == 0x5A


def test_loopback_overrun() -> None:
    bench = Bench()
    bench.write(MCR, 0x18)
    bench.write(IER, 0x04)
    bench.write(DATA, 1)
    bench.write(DATA, 2)
    assert bench.read(IIR) == 0x06
    assert bench.read(LSR) == 0x63
    assert bench.read(LSR) == 0x61  # reading cleared it
    assert bench.read(DATA) == 2


def test_modem_status_changes() -> None:
    bench = Bench()
    assert bench.read(MSR) == 0xB0
    bench.write(MCR, 0x1F)
    assert bench.read(MSR) == 0xF0  # RI rose: no delta for that
    bench.write(IER, 0x08)
    bench.write(MCR, 0x10)
    assert bench.read(IIR) == 0x00
    assert bench.read(MSR) == 0x0F
    assert bench.read(IIR) == 0x01


def test_without_out2_the_line_stays_low() -> None:
    bench = Bench()
    bench.write(MCR, 0x03)
    bench.write(IER, 0x02)
    assert not bench.level
    bench.write(MCR, 0x0B)
    assert bench.level


def test_scratch_and_reserved_bits() -> None:
    bench = Bench()
    bench.write(SCRATCH, 0xA5)
    bench.write(IER, 0xF0)
    bench.write(MCR, 0xE0)
    bench.write(LSR, 0xFF)
    bench.write(MSR, 0xFF)
    assert [bench.read(port) for port in (SCRATCH, IER, MCR, LSR)] == [0xA5, 0, 0, 0x60]


pokes = st.one_of(
    st.tuples(st.just("write"), st.integers(DATA, SCRATCH), st.integers(0, 0xFF)),
    st.tuples(st.just("read"), st.integers(DATA, SCRATCH), st.just(0)),
    st.tuples(st.just("feed"), st.just(0), st.integers(0, 40)),
)


@given(st.lists(pokes, max_size=60))
def test_any_use_keeps_it_alive_and_restorable(sequence: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    for action, port, value in sequence:
        if action == "write":
            bench.write(port, value)
        elif action == "read":
            assert 0 <= bench.read(port) <= 0xFF
        else:
            assert bench.uart.feed(bytes(value)) == value
        assert len(bench.uart.received) <= FIFO_SIZE
        assert bench.level == (bench.uart.interrupt() != 1 and bench.uart.mcr & 0x18 == 0x08)
    state = bench.uart.state()
    copy = Bench()
    copy.uart.load(json.loads(json.dumps(state)))
    assert copy.uart.state() == state
    assert [copy.read(port) for port in range(DATA, SCRATCH)] == [bench.read(port) for port in range(DATA, SCRATCH)]
