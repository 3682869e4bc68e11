"""System control port B, 0x61: the speaker, counter 2's gate and two bits software times itself by.

After IBM's PC/AT Technical Reference and Intel's 82371AB (NMISC). Parity and channel check never report anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emulator.devices.pit8254 import Pit8254
from emulator.devices.state import Registers, Stateful, integer

GATE2 = 0x01
REFRESH_TOGGLE = 0x10
OUT2 = 0x20
#: ns between two memory refresh requests, each of which inverts bit 4: 18 pulses of the timer's clock.
REFRESH_NS = 15085


class Port61(Stateful):
    """Port 0x61; bits 0-3 are stored, 4 and 5 read from the clock and the timer, 6 and 7 are 0."""

    STATE: ClassVar[Registers] = {"control": integer(0x0F)}
    PORTS = (0x61,)

    def __init__(self, now: Callable[[], int], pit: Pit8254) -> None:
        """`now` gives virtual ns."""
        self._now = now
        self._pit = pit
        self.control = 0

    def port_read(self, port: int, size: int) -> int:
        """Read the port."""
        refresh = REFRESH_TOGGLE if self._now() // REFRESH_NS & 1 else 0
        return self.control | refresh | (OUT2 if self._pit.out2() else 0)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write bits 0-3; bit 0 gates counter 2."""
        self.control = value & 0x0F
        self._pit.set_gate2(bool(value & GATE2))
