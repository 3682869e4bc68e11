"""The local APIC, held against Intel's SDM volume 3."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.lapic import (
    ALL,
    ALL_BUT_SELF,
    INIT,
    LVT_WRITABLE,
    MASKED,
    NMI,
    NO_SHORTHAND,
    SECOND,
    SELF,
    SIZE,
    STARTUP,
    Ipi,
    Lapic,
    Register,
)

PERIODIC, TSC_DEADLINE = 1 << 17, 2 << 17
BY_1, BY_2, BY_16 = 0x0B, 0x00, 0x03


class Bench:
    """An enabled APIC, the clock it looks at and what it sent."""

    def __init__(self, apic_id: int = 0, bus_hz: int = SECOND, enable: bool = True) -> None:
        self.ns = 0
        self.sent: list[Ipi] = []
        self.apic = Lapic(lambda: self.ns, apic_id, self.sent.append, bus_hz)
        if enable:
            self.apic.write(Register.SVR, 0x1FF)

    def start(self, entry: int, count: int, divide: int = BY_1) -> None:
        self.apic.write(Register.LVT_TIMER, entry)
        self.apic.write(Register.DIVIDE, divide)
        self.apic.write(Register.INITIAL_COUNT, count)

    def send(self, low: int, destination: int = 0) -> None:
        self.apic.write(Register.ICR_HIGH, destination << 24)
        self.apic.write(Register.ICR_LOW, low)

    def expiries(self, until_ns: int) -> list[int]:
        """Run to `until_ns`, serving every interrupt at once; return when they came."""
        times = []
        while (event := self.apic.next_event()) is not None and event <= until_ns:
            self.ns = event
            self.apic.advance(event)
            assert self.apic.acknowledge() == 0xEC
            self.apic.write(Register.EOI, 0)
            times.append(event)
        self.ns = until_ns
        return times


def test_registers_after_reset() -> None:
    apic = Bench(apic_id=3, enable=False).apic
    expected = {Register.ID: 3 << 24, Register.VERSION: 0x50014, Register.SVR: 0xFF, Register.DFR: 0xFFFFFFFF}
    expected |= dict.fromkeys((Register.TPR, Register.PPR, Register.LDR, Register.ICR_LOW, Register.CURRENT_COUNT), 0)
    expected |= dict.fromkeys(LVT_WRITABLE, MASKED)
    assert {offset: apic.read(offset) for offset in expected} == expected
    assert apic.accepts_extint
    assert apic.pending() is None


def test_delivery_service_and_eoi() -> None:
    apic = Bench().apic
    apic.post(0x31)
    apic.post(0x41)
    assert (apic.read(Register.IRR + 0x10), apic.read(Register.IRR + 0x20)) == (1 << 0x11, 1 << 1)
    assert apic.acknowledge() == 0x41
    assert apic.read(Register.ISR + 0x20) == 1 << 1
    assert apic.read(Register.PPR) == 0x40
    assert apic.pending() is None  # class 3 waits for class 4
    apic.post(0x4F)
    assert apic.pending() is None  # the same class does not nest
    apic.post(0x50)
    assert apic.acknowledge() == 0x50
    apic.write(Register.EOI, 0)
    apic.write(Register.EOI, 0)
    assert apic.acknowledge() == 0x4F


def test_eoi_with_nothing_in_service_does_nothing() -> None:
    apic = Bench().apic
    apic.write(Register.EOI, 0)
    assert apic.isr == 0


def test_task_priority() -> None:
    apic = Bench().apic
    apic.write(Register.TPR, 0x35)
    apic.post(0x3F)
    assert apic.pending() is None
    assert apic.read(Register.PPR) == 0x35
    apic.post(0x40)
    assert apic.acknowledge() == 0x40
    assert apic.read(Register.PPR) == 0x40
    apic.write(Register.EOI, 0)
    apic.write(Register.TPR, 0)
    assert apic.acknowledge() == 0x3F


def test_nothing_to_acknowledge_gives_the_spurious_vector() -> None:
    apic = Bench().apic
    assert apic.acknowledge() == 0xFF
    assert apic.isr == 0


def test_software_disable_masks_the_lvt_and_refuses_vectors() -> None:
    apic = Bench().apic
    apic.write(Register.LVT_LINT0, 0x700)
    apic.write(Register.SVR, 0xFF)
    assert apic.read(Register.LVT_LINT0) == 0x700 | MASKED
    apic.write(Register.LVT_TIMER, 0x30)
    assert apic.read(Register.LVT_TIMER) == 0x30 | MASKED
    apic.post(0x40)
    assert apic.irr == 0


def test_the_8259_comes_through_lint0() -> None:
    apic = Bench().apic
    assert not apic.accepts_extint
    apic.write(Register.LVT_LINT0, 0x700)
    assert apic.accepts_extint
    apic.write(Register.LVT_LINT0, 0x700 | MASKED)
    assert not apic.accepts_extint
    apic.write(Register.LVT_LINT0, 0x031)  # fixed
    assert not apic.accepts_extint


def test_one_shot() -> None:
    bench = Bench()
    bench.ns = 500
    bench.start(0xEC, 1000, BY_2)
    bench.ns = 1500
    assert bench.apic.read(Register.CURRENT_COUNT) == 500
    assert bench.expiries(10_000) == [2500]
    assert bench.apic.read(Register.CURRENT_COUNT) == 0
    bench.apic.write(Register.INITIAL_COUNT, 7)
    bench.apic.write(Register.INITIAL_COUNT, 0)  # stops it
    assert bench.apic.next_event() is None


@pytest.mark.parametrize(
    ("register", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_divide_configuration(register: int, divisor: int) -> None:
    bench = Bench()
    bench.start(0xEC, 100, register)
    assert bench.apic.next_event() == 100 * divisor


def test_changing_the_divider_goes_on_with_the_rest() -> None:
    bench = Bench()
    bench.start(0xEC, 1000, BY_1)
    bench.ns = 400
    bench.apic.write(Register.DIVIDE, BY_16)
    assert bench.apic.next_event() == 400 + 600 * 16


def test_periodic_without_drift() -> None:
    bus_hz = 333_333_333
    bench = Bench(bus_hz=bus_hz)
    bench.start(0xEC | PERIODIC, 100_000)
    assert bench.expiries(SECOND) == [-(-100_000 * n * SECOND // bus_hz) for n in range(1, 3334)]


def test_missed_periods_collapse_and_keep_the_phase() -> None:
    bench = Bench()
    bench.start(0xEC | PERIODIC, 1000)
    bench.ns = 7500
    bench.apic.advance(7500)
    assert bench.apic.acknowledge() == 0xEC
    assert bench.apic.next_event() == 8000
    assert bench.apic.read(Register.CURRENT_COUNT) == 500


def test_a_masked_timer_expires_silently() -> None:
    bench = Bench()
    bench.start(0xEC | MASKED, 100)
    assert bench.apic.next_event() is None
    bench.ns = 200
    bench.apic.write(Register.LVT_TIMER, 0xEC)
    bench.apic.advance(300)
    assert bench.apic.pending() is None


def test_tsc_deadline() -> None:
    bench = Bench()
    bench.start(0xEC | TSC_DEADLINE, 100)
    assert bench.apic.next_event() is None  # the initial count means nothing in this mode
    bench.apic.set_tsc_deadline(5000)
    assert bench.apic.next_event() == bench.apic.tsc_deadline == 5000
    bench.apic.advance(4999)
    assert bench.apic.pending() is None
    assert bench.expiries(6000) == [5000]
    assert bench.apic.tsc_deadline is None
    bench.apic.set_tsc_deadline(1)  # past: at once
    assert bench.apic.acknowledge() == 0xEC
    bench.apic.set_tsc_deadline(9000)
    bench.apic.set_tsc_deadline(0)
    assert bench.apic.next_event() is None


def test_leaving_tsc_deadline_mode_disarms() -> None:
    bench = Bench()
    bench.apic.set_tsc_deadline(5000)  # another mode: ignored
    assert bench.apic.tsc_deadline is None
    bench.apic.write(Register.LVT_TIMER, 0xEC | TSC_DEADLINE)
    bench.apic.set_tsc_deadline(5000)
    bench.apic.write(Register.LVT_TIMER, 0xEC)
    assert bench.apic.next_event() is None


def test_self_ipi_stays_here() -> None:
    bench = Bench()
    bench.send(0x400F6)  # Linux's irq_work
    assert bench.apic.acknowledge() == 0xF6
    assert bench.sent == []
    assert bench.apic.read(Register.ICR_LOW) == 0x400F6  # delivery status: idle


@pytest.mark.parametrize(
    ("low", "destination", "here", "sent"),
    [
        (0x000F6, 2, True, False),  # physical, this one
        (0x000F6, 5, False, True),
        (0x000F6, 0xFF, True, True),
        (0x008F6, 0x04, True, False),  # logical, this one's bit
        (0x008F6, 0x06, True, True),
        (0x008F6, 0x01, False, True),
        (0x009F6, 0x06, True, False),  # lowest priority: one is enough
        (0x800F6, 0, True, True),  # all
        (0xC00F6, 0, False, True),  # all but self
    ],
)
def test_destinations(low: int, destination: int, here: bool, sent: bool) -> None:
    bench = Bench(apic_id=2)
    bench.apic.write(Register.LDR, 0x04 << 24)
    bench.send(low, destination)
    assert (bench.apic.pending() == 0xF6, len(bench.sent) == 1) == (here, sent)


def test_two_processors() -> None:
    first, second = Bench(apic_id=0), Bench(apic_id=1)
    first.send(0x000FD, 1)
    (ipi,) = first.sent
    assert second.apic.addressed_by(ipi)
    second.apic.post(ipi.vector)
    assert second.apic.acknowledge() == 0xFD
    assert first.apic.pending() is None


def test_start_up_messages_are_handed_out() -> None:
    bench = Bench()
    bench.send(0x0C500, 1)
    bench.send(0x0069A, 1)
    bench.send(0x00400, 0)
    assert [(ipi.mode, ipi.vector, ipi.destination) for ipi in bench.sent] == [
        (INIT, 0, 1),
        (STARTUP, 0x9A, 1),
        (NMI, 0, 0),
    ]
    assert bench.sent[0].asserted
    assert bench.apic.irr == 0


def test_logical_cluster_destinations() -> None:
    apic = Bench().apic
    apic.write(Register.DFR, 0x0FFFFFFF)
    apic.write(Register.LDR, 0x12 << 24)
    for destination, expected in ((0x12, True), (0x13, True), (0x11, False), (0x22, False), (0xFF, True)):
        ipi = Ipi(0, 0xF6, destination, True, NO_SHORTHAND, True)
        assert apic.addressed_by(ipi) is expected


@pytest.mark.parametrize(
    ("shorthand", "self_included", "others_included"),
    [(SELF, True, False), (ALL, True, True), (ALL_BUT_SELF, False, True)],
)
def test_shorthands(shorthand: int, self_included: bool, others_included: bool) -> None:
    apic = Bench().apic
    ipi = Ipi(0, 0xF6, 77, False, shorthand, True)
    assert apic.addressed_by(ipi, from_self=True) is self_included
    assert apic.addressed_by(ipi) is others_included


def test_errors_are_latched_by_a_write_and_interrupt() -> None:
    bench = Bench()
    bench.apic.write(Register.LVT_ERROR, 0xFE)
    bench.send(0x40005)
    bench.apic.post(3)
    assert bench.apic.read(0x3F0) == 0
    bench.apic.write(0x002, 1)
    assert bench.apic.acknowledge() == 0xFE
    assert bench.apic.read(Register.ESR) == 0
    bench.apic.write(Register.ESR, 0)
    assert bench.apic.read(Register.ESR) == 0xE0  # send vector, received vector, register address
    bench.apic.write(Register.ESR, 0)
    assert bench.apic.read(Register.ESR) == 0


def test_reserved_bits_do_not_stick_and_read_only_registers_stay() -> None:
    apic = Bench().apic
    for offset, bits in LVT_WRITABLE.items():
        apic.write(offset, 0xFFFFFFFF)
        assert apic.read(offset) == bits
    for offset in (Register.ID, Register.VERSION, Register.PPR, Register.CURRENT_COUNT, Register.ISR, Register.IRR):
        before = apic.read(offset)
        apic.write(offset, 0xFFFFFFFF)
        assert apic.read(offset) == before
    assert apic.errors == 0


offsets = st.one_of(st.integers(0, 0x3F).map(lambda index: index * 16), st.integers(0, SIZE - 1))
pokes = st.one_of(
    st.tuples(st.just("write"), offsets, st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("read"), offsets, st.just(0)),
    st.tuples(st.just("post"), st.integers(0, 0xFF), st.just(0)),
    st.tuples(st.just("deadline"), st.integers(0, (1 << 64) - 1), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 10 * SECOND), st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
)


@given(st.lists(pokes, max_size=50))
def test_any_use_keeps_it_alive_and_restorable(sequence: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    apic = bench.apic
    for action, where, value in sequence:
        if action == "write":
            apic.write(where, value)
        elif action == "read":
            assert 0 <= apic.read(where) <= 0xFFFFFFFF
        elif action == "post":
            apic.post(where)
        elif action == "deadline":
            apic.set_tsc_deadline(where)
        elif action == "wait":
            bench.ns += where
            apic.advance(bench.ns)
            event = apic.next_event()
            assert event is None or event > bench.ns
        else:
            vector = apic.pending()
            assert apic.acknowledge() == (apic.svr & 0xFF if vector is None else vector)
        assert apic.irr & 0xFFFF == 0
    state = apic.state()
    copy = Bench()
    copy.ns = bench.ns
    copy.apic.load(json.loads(json.dumps(state)))
    assert copy.apic.state() == state
    assert copy.apic.next_event() == apic.next_event()
    assert copy.apic.pending() == apic.pending()
