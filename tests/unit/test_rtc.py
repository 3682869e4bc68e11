"""The real-time clock, held against the MC146818 data sheet."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.rtc import CENTURY, SIZE, TIME_REGISTERS, Rtc

SECOND = 1_000_000_000
B_SET, B_BINARY, B_24_HOURS = 0x80, 0x04, 0x02


class Bench:
    def __init__(self, moment: datetime) -> None:
        self.ns = 0
        self.rtc = Rtc(lambda: self.ns, int(moment.timestamp()) * SECOND)

    def read(self, register: int) -> int:
        self.rtc.port_write(0x70, 1, register)
        return self.rtc.port_read(0x71, 1)

    def write(self, register: int, value: int) -> None:
        self.rtc.port_write(0x70, 1, register)
        self.rtc.port_write(0x71, 1, value)

    def time(self) -> list[int]:
        return [self.read(register) for register in TIME_REGISTERS]


MOMENT = datetime(2024, 2, 29, 23, 59, 58, tzinfo=UTC)  # a Thursday


def test_bcd_is_the_default() -> None:
    assert Bench(MOMENT).time() == [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]


def test_binary_mode_and_virtual_time() -> None:
    bench = Bench(MOMENT)
    bench.write(0x0B, B_24_HOURS | B_BINARY)
    bench.ns = 3 * SECOND
    assert bench.time() == [1, 0, 0, 6, 1, 3, 24, 20]


def test_control_registers() -> None:
    bench = Bench(MOMENT)
    assert [bench.read(register) for register in (0x0A, 0x0B, 0x0C, 0x0D)] == [0x26, 0x02, 0x00, 0x80]
    for register in (0x0A, 0x0C, 0x0D):
        bench.write(register, 0xFF)
    assert [bench.read(register) for register in (0x0A, 0x0C, 0x0D)] == [0x7F, 0x00, 0x80]  # UIP, C, D: read only
    bench.write(0x0B, 0x00)
    assert bench.read(0x0B) & B_24_HOURS


def test_the_index_register_ignores_the_nmi_mask_and_cannot_be_read() -> None:
    bench = Bench(MOMENT)
    bench.rtc.port_write(0x70, 1, 0x80 | 0x0D)
    assert (bench.rtc.port_read(0x71, 1), bench.rtc.port_read(0x70, 1)) == (0x80, 0xFF)


def test_setting_the_time() -> None:
    bench = Bench(MOMENT)
    bench.write(0x0B, B_24_HOURS | B_SET)
    bench.ns = 10 * SECOND
    assert bench.read(0) == 0x58  # no update while SET
    for register, value in zip(TIME_REGISTERS, [0x30, 0x45, 0x12, 1, 0x31, 0x12, 0x99, 0x19], strict=True):
        bench.write(register, value)
    bench.write(0x0B, B_24_HOURS)
    bench.ns += 31 * SECOND
    assert bench.time() == [0x01, 0x46, 0x12, 6, 0x31, 0x12, 0x99, 0x19]  # the weekday is always the true one


def test_setting_one_register_without_set() -> None:
    bench = Bench(MOMENT)
    bench.write(4, 0x05)
    assert bench.time()[:3] == [0x58, 0x59, 0x05]


def test_an_impossible_time_is_not_taken() -> None:
    bench = Bench(MOMENT)
    bench.write(7, 0x31)  # 31 February
    assert bench.read(7) == 0x29


def test_nvram() -> None:
    bench = Bench(MOMENT)
    bench.write(0x40, 0xAB)
    assert bench.read(0x40) == 0xAB


@pytest.mark.parametrize("epoch", [-SECOND, 0, 1 << 80])
def test_extreme_epochs_are_clamped(epoch: int) -> None:
    rtc = Rtc(lambda: 0, epoch)
    rtc.port_write(0x70, 1, CENTURY)
    assert rtc.port_read(0x71, 1) in (0x19, 0x99)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 0xFF), st.integers(0, SECOND * 86400)), max_size=30))
def test_any_use_keeps_it_alive_and_restorable(writes: list[tuple[int, int, int]]) -> None:
    bench = Bench(MOMENT)
    for register, value, wait in writes:
        bench.write(register, value)
        bench.ns += wait
        assert 0 <= bench.read(register) <= 0xFF
    state = bench.rtc.state()
    copy = Bench(MOMENT)
    copy.ns = bench.ns
    copy.rtc.load(json.loads(json.dumps(state)))
    assert copy.rtc.state() == state
    assert copy.time() == bench.time()
