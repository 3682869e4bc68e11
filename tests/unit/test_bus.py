"""The port space."""

from __future__ import annotations

import pytest

from emulator.devices.bus import EXPECTED_EMPTY, UNKNOWN_MAX, PortBus


class Memory:
    """Four ports that remember a byte each."""

    PORTS = range(0x100, 0x104)

    def __init__(self) -> None:
        self.bytes = bytearray(4)

    def port_read(self, port: int, size: int) -> int:
        assert size == 1
        return self.bytes[port - 0x100]

    def port_write(self, port: int, size: int, value: int) -> None:
        assert size == 1
        self.bytes[port - 0x100] = value


@pytest.mark.parametrize("size", [1, 2, 4])
def test_wide_accesses_are_bytes_low_first(size: int) -> None:
    memory = Memory()
    bus = PortBus([memory])
    bus.write(0x100, size, 0x44332211)
    assert memory.bytes[:size] == bytes([0x11, 0x22, 0x33, 0x44])[:size]
    assert bus.read(0x100, size) == 0x44332211 & (1 << 8 * size) - 1


def test_a_wide_access_over_the_end_of_a_device() -> None:
    bus = PortBus([Memory()])
    assert bus.read(0x102, 4) == 0xFFFF0000


@pytest.mark.parametrize("size", [1, 2, 4])
def test_empty_ports_read_all_ones(size: int) -> None:
    bus = PortBus()
    bus.write(0x2F8, size, 0)
    assert bus.read(0x2F8, size) == (1 << 8 * size) - 1
    assert bus.unknown == dict.fromkeys(range(0x2F8, 0x2F8 + size), 2)


def test_expected_empty_ports_are_not_counted() -> None:
    bus = PortBus()
    for port in EXPECTED_EMPTY:
        bus.write(port, 1, 0)
        assert bus.read(port, 1) == 0xFF
    assert bus.unknown == {}


def test_the_count_is_bounded_and_ports_wrap() -> None:
    bus = PortBus()
    for port in range(0x1000, 0x1000 + 2 * UNKNOWN_MAX):
        bus.read(port, 1)
    bus.read(0x1000, 1)
    assert len(bus.unknown) == UNKNOWN_MAX
    assert bus.unknown[0x1000] == 2
    assert bus.read(0xFFFF, 4) == 0xFFFFFFFF


def test_a_port_belongs_to_one_device() -> None:
    with pytest.raises(ValueError, match=r"0x100 is taken by Memory"):
        PortBus([Memory(), Memory()])
