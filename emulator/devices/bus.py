"""The I/O port space: which device answers a port, and what an empty port answers.

An 8-bit bus, as ISA is: a wider access becomes byte accesses to consecutive ports, low byte first. Nothing answers at
an empty port: it reads all ones and ignores writes, which is how a guest finds that there is no keyboard controller
(0x64) and no PCI (0xcf8). `unknown` counts the accesses to other empty ports, to show what a guest looked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

#: Ports every PC kernel touches and that are empty here on purpose: POST code and its twin used as a delay, keyboard
#: controller, PCI configuration.
EXPECTED_EMPTY = frozenset([0x80, 0xED, 0x60, 0x64, *range(0xCF8, 0xD00)])
#: How many different unknown ports are counted; a guest that scans all of them is not worth more.
UNKNOWN_MAX = 256


class PortDevice(Protocol):
    """What the bus asks of a device: its ports, and byte access to them."""

    @property
    def PORTS(self) -> Iterable[int]: ...

    def port_read(self, port: int, size: int) -> int: ...

    def port_write(self, port: int, size: int, value: int) -> None: ...


class PortBus:
    """Dispatch from port number to device."""

    def __init__(self, devices: Iterable[PortDevice] = ()) -> None:
        self._devices: dict[int, PortDevice] = {}
        self.unknown: dict[int, int] = {}
        for device in devices:
            self.attach(device)

    def attach(self, device: PortDevice) -> None:
        """Give `device` its ports; ValueError when one of them is taken."""
        for port in device.PORTS:
            if port in self._devices:
                raise ValueError(f"port {port:#x} is taken by {type(self._devices[port]).__name__}")
            self._devices[port] = device

    def read(self, port: int, size: int) -> int:
        """Read `size` (1, 2 or 4) bytes at `port`."""
        if size == 1:
            device = self._devices.get(port)
            if device is not None:
                return device.port_read(port, 1) & 0xFF
            self._count(port)
            return 0xFF
        return sum(self.read(port + index & 0xFFFF, 1) << 8 * index for index in range(size))

    def write(self, port: int, size: int, value: int) -> None:
        """Write the low `size` (1, 2 or 4) bytes of `value` at `port`."""
        if size == 1:
            device = self._devices.get(port)
            if device is not None:
                device.port_write(port, 1, value & 0xFF)
            else:
                self._count(port)
            return
        for index in range(size):
            self.write(port + index & 0xFFFF, 1, value >> 8 * index)

    def _count(self, port: int) -> None:
        if port not in EXPECTED_EMPTY and (port in self.unknown or len(self.unknown) < UNKNOWN_MAX):
            self.unknown[port] = self.unknown.get(port, 0) + 1
