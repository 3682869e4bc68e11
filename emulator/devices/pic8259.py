"""The PC's two 8259A interrupt controllers, after Intel's 8259A data sheet (231468), and the chipset's ELCR registers.

`Pic8259` is one chip, `PicPair` the PC's wiring of two: the slave's output drives the master's line 2.

As on a PC: 8086 mode only; ICW1's LTIM bit does nothing, each line is edge or level triggered as ELCR says; ICW3 is
accepted and ignored, the wiring being fixed. An edge-triggered request is withdrawn when its line falls before it is
acknowledged, as the data sheet has it; acknowledging then yields the spurious line 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from emulator.devices.state import Registers, Stateful, flag, integer

CASCADE_LINE = 2
SPURIOUS_LINE = 7


class Pic8259(Stateful):
    """One 8259A with eight lines; `cascade` is the mask of lines that carry another chip's output."""

    STATE: ClassVar[Registers] = {
        "lines": integer(0xFF),
        "edges": integer(0xFF),
        "isr": integer(0xFF),
        "imr": integer(0xFF),
        "elcr": integer(0xFF),
        "base": integer(0xF8),
        "lowest": integer(7),
        "next_icw": integer(4),
        "single": flag,
        "wants_icw4": flag,
        "auto_eoi": flag,
        "rotate_on_auto_eoi": flag,
        "fully_nested_slaves": flag,
        "special_mask": flag,
        "reads_isr": flag,
        "polled": flag,
    }

    def __init__(self, cascade: int = 0) -> None:
        self.cascade = cascade
        self.lines = 0  # levels of the inputs
        self.edges = 0  # rising edges seen and not acknowledged yet
        self.elcr = 0  # which lines are level triggered
        self.base = 0
        self.auto_eoi = self.rotate_on_auto_eoi = self.fully_nested_slaves = False
        self.special_mask = self.reads_isr = self.polled = False
        self._initialise(0)
        self.next_icw = 0
        self.imr = 0xFF  # undefined at power-on: masked, so that nothing reaches a guest that has not begun

    @property
    def irr(self) -> int:
        """Lines asking for service: edges remembered and the levels of level-triggered lines."""
        return self.edges | self.lines & self.elcr

    def set_line(self, line: int, level: bool) -> None:
        """Drive input `line` (0-7)."""
        bit = 1 << line
        if not level:
            self.lines &= ~bit
            self.edges &= ~bit
        elif not self.lines & bit:
            self.lines |= bit
            if not self.elcr & bit:
                self.edges |= bit

    def requested(self) -> int | None:
        """Return the line that would be served now, None when the INT output is low."""
        requests = self.irr & ~self.imr
        if not requests:
            return None
        serving = self.isr
        if self.special_mask:
            serving &= ~self.imr
        if self.fully_nested_slaves:
            serving &= ~self.cascade
        for line in self._by_priority():
            if serving >> line & 1:
                return None
            if requests >> line & 1:
                return line
        return None

    def take(self) -> int | None:
        """Do what INTA does to the registers; return the line now in service, None when the request went away."""
        line = self.requested()
        if line is None:
            return None
        self.edges &= ~(1 << line)
        if not self.auto_eoi:
            self.isr |= 1 << line
        elif self.rotate_on_auto_eoi:
            self.lowest = line
        return line

    def read(self, a0: int) -> int:
        """Read at address line A0: the IMR when 1, else the poll word, ISR or IRR as the last OCW3 said."""
        if self.polled:
            self.polled = False
            line = self.take()
            return 0 if line is None else 0x80 | line
        if a0:
            return self.imr
        return self.isr if self.reads_isr else self.irr

    def write(self, a0: int, value: int) -> None:
        """Write an initialisation (ICW) or operation (OCW) command word."""
        if a0:
            self._write_high(value)
        elif value & 0x10:
            self._initialise(value)
        elif value & 0x08:
            self._ocw3(value)
        else:
            self._ocw2(value)

    def _by_priority(self) -> list[int]:
        return [(self.lowest + step) & 7 for step in range(1, 9)]

    def _initialise(self, icw1: int) -> None:
        self.edges = 0  # the edge sense circuit is reset: a line that is already high must fall and rise again
        self.isr = 0
        self.imr = 0
        self.lowest = 7
        self.special_mask = False
        self.reads_isr = False
        self.polled = False
        self.single = bool(icw1 & 0x02)
        self.wants_icw4 = bool(icw1 & 0x01)
        self.auto_eoi = False
        self.rotate_on_auto_eoi = False
        self.fully_nested_slaves = False
        self.next_icw = 2

    def _write_high(self, value: int) -> None:
        if self.next_icw == 2:
            self.base = value & 0xF8
            self.next_icw = 3 if not self.single else 4 if self.wants_icw4 else 0
        elif self.next_icw == 3:
            self.next_icw = 4 if self.wants_icw4 else 0
        elif self.next_icw == 4:
            self.auto_eoi = bool(value & 0x02)
            self.fully_nested_slaves = bool(value & 0x10)
            self.next_icw = 0
        else:
            self.imr = value

    def _ocw2(self, value: int) -> None:
        rotate, specific, eoi = value & 0x80, value & 0x40, value & 0x20
        if eoi:
            line = value & 7 if specific else self._highest_in_service()
            if line is not None:
                self.isr &= ~(1 << line)
                if rotate:
                    self.lowest = line
        elif specific:
            if rotate:
                self.lowest = value & 7
        else:
            self.rotate_on_auto_eoi = bool(rotate)

    def _highest_in_service(self) -> int | None:
        # In special mask mode a non-specific EOI does not see the lines masked by the IMR.
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        return next((line for line in self._by_priority() if serving >> line & 1), None)

    def _ocw3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        if value & 0x02:
            self.reads_isr = bool(value & 0x01)
        self.polled = bool(value & 0x04)


class PicPair(Stateful):
    """Both controllers of a PC: lines 0-7 and 8-15, ports 0x20, 0x21, 0xa0, 0xa1 and ELCR at 0x4d0, 0x4d1."""

    PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
    #: Lines that can be level triggered; 0, 1, 2, 8 and 13 are always edges (Intel 82371AB, ELCR1 and ELCR2).
    ELCR_WRITABLE = (0xF8, 0xDE)

    def __init__(self) -> None:
        self.master = Pic8259(cascade=1 << CASCADE_LINE)
        self.slave = Pic8259()

    def parts(self) -> dict[str, Stateful]:
        return {"master": self.master, "slave": self.slave}

    def set_line(self, irq: int, level: bool) -> None:
        """Drive line `irq`, 0-15 except 2."""
        if irq < 8:
            self.master.set_line(irq, level)
        else:
            self.slave.set_line(irq - 8, level)
            self._drive_cascade()

    def line(self, irq: int) -> Callable[[bool], None]:
        """Return the function that drives line `irq`, to hand to a device."""
        return partial(self.set_line, irq)

    def pending(self) -> bool:
        """Tell whether INTR is high: `acknowledge` would return a real interrupt."""
        return self.master.requested() is not None

    def acknowledge(self) -> int:
        """Run the CPU's INTA cycles; return the vector (that of line 7 or 15 when the request went away)."""
        line = self.master.take()
        if line is None:
            return self.master.base | SPURIOUS_LINE
        if line != CASCADE_LINE:
            return self.master.base | line
        slave_line = self.slave.take()
        self._pulse_cascade()
        return self.slave.base | (SPURIOUS_LINE if slave_line is None else slave_line)

    def port_read(self, port: int, size: int) -> int:
        """Read one byte of a register."""
        if port >= 0x4D0:
            return self._chip(port).elcr
        if port < 0xA0:
            return self.master.read(port & 1)
        polled = self.slave.polled
        value = self.slave.read(port & 1)
        if polled:
            self._pulse_cascade()
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write one byte of a register."""
        if port >= 0x4D0:
            self._chip(port).elcr = value & self.ELCR_WRITABLE[port & 1]
        else:
            self._chip(port).write(port & 1, value & 0xFF)
        self._drive_cascade()

    def _chip(self, port: int) -> Pic8259:
        return self.slave if port in (0xA0, 0xA1, 0x4D1) else self.master

    def _drive_cascade(self) -> None:
        self.master.set_line(CASCADE_LINE, self.slave.requested() is not None)

    def _pulse_cascade(self) -> None:
        # The slave's INT falls during INTA even when a further request waits: that is the master's next edge.
        self.master.set_line(CASCADE_LINE, False)
        self._drive_cascade()
