"""A 16550A serial port, after National's PC16550D data sheet; COM1 of a PC is ports 0x3f8-0x3ff on interrupt line 4.

The wire is ideal: a byte written is sent at once, whatever the divisor, so the transmitter is always empty; a byte
fed waits until the receiver has room, so nothing overruns but a loopback the guest does not read. The receiver's
time-out interrupt comes without its four character times of delay. There are no parity, framing or break errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emulator.devices.state import Registers, Stateful, flag, integer, integers

FIFO_SIZE = 16
#: Bytes that may wait for room in the receiver; a bound of ours, enough for a pasted page.
BACKLOG_MAX = 4096
TRIGGER_LEVELS = (1, 4, 8, 14)

IER_RECEIVED, IER_TRANSMIT_EMPTY, IER_LINE_STATUS, IER_MODEM_STATUS = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_MODEM_STATUS, IIR_TRANSMIT_EMPTY = 0x01, 0x00, 0x02
IIR_RECEIVED, IIR_LINE_STATUS, IIR_TIMEOUT, IIR_FIFO = 0x04, 0x06, 0x0C, 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 0x01, 0x02
LCR_DLAB = 0x80
MCR_OUT2, MCR_LOOP = 0x08, 0x10
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMITTER_EMPTY = 0x01, 0x02, 0x60
MSR_RING, MSR_DELTA = 0x40, 0x0F
#: CTS, DSR and DCD asserted: a terminal is there.
MSR_CONNECTED = 0xB0


class Uart8250(Stateful):
    """A 16550A; what the guest sends goes to `sink`, one byte a call."""

    STATE: ClassVar[Registers] = {
        "ier": integer(0x0F),
        "lcr": integer(0xFF),
        "mcr": integer(0x1F),
        "msr": integer(0xFF),
        "scratch": integer(0xFF),
        "divisor": integer(0xFFFF),
        "fifo_enabled": flag,
        "trigger": integer(14, 1),
        "received": integers(0xFF, FIFO_SIZE),
        "backlog": integers(0xFF, BACKLOG_MAX),
        "overrun": flag,
        "transmit_empty_pending": flag,
    }

    def __init__(self, sink: Callable[[int], None], set_line: Callable[[bool], None], base: int = 0x3F8) -> None:
        self.PORTS = range(base, base + 8)
        self._sink = sink
        self._set_line = set_line
        self.ier = self.lcr = self.mcr = self.scratch = 0
        self.msr = MSR_CONNECTED
        self.divisor = 0
        self.fifo_enabled = False
        self.trigger = 1
        self.received: list[int] = []
        self.backlog: list[int] = []
        self.overrun = False
        self.transmit_empty_pending = False

    def feed(self, data: bytes) -> int:
        """Send bytes to the guest; return how many were taken (the rest did not fit: feed it again later)."""
        taken = data[: BACKLOG_MAX - len(self.backlog)]
        self.backlog += taken
        self._refill()
        self._update_line()
        return len(taken)

    def port_read(self, port: int, size: int) -> int:
        """Read a register, one byte."""
        value = self._read(port & 7)
        self._update_line()
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write a register, one byte."""
        self._write(port & 7, value & 0xFF)
        self._update_line()

    def interrupt(self) -> int:
        """Return the identification (IIR bits 3-0) of the most urgent enabled interrupt."""
        if self.ier & IER_LINE_STATUS and self.overrun:
            return IIR_LINE_STATUS
        if self.ier & IER_RECEIVED and self.received:
            return IIR_RECEIVED if not self.fifo_enabled or len(self.received) >= self.trigger else IIR_TIMEOUT
        if self.ier & IER_TRANSMIT_EMPTY and self.transmit_empty_pending:
            return IIR_TRANSMIT_EMPTY
        if self.ier & IER_MODEM_STATUS and self.msr & MSR_DELTA:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _read(self, register: int) -> int:
        match register:
            case 0 | 1 if self.lcr & LCR_DLAB:
                return self.divisor >> 8 * register & 0xFF
            case 0:
                return self._receive()
            case 1:
                return self.ier
            case 2:
                identification = self.interrupt()
                if identification == IIR_TRANSMIT_EMPTY:
                    self.transmit_empty_pending = False
                return identification | (IIR_FIFO if self.fifo_enabled else 0)
            case 3:
                return self.lcr
            case 4:
                return self.mcr
            case 5:
                status = LSR_TRANSMITTER_EMPTY | (LSR_DATA_READY if self.received else 0)
                status |= LSR_OVERRUN if self.overrun else 0
                self.overrun = False
                return status
            case 6:
                status = self.msr
                self.msr &= ~MSR_DELTA
                return status
            case _:
                return self.scratch

    def _write(self, register: int, value: int) -> None:
        match register:
            case 0 | 1 if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 >> 8 * register | value << 8 * register
            case 0:
                self._transmit(value)
            case 1:
                if value & ~self.ier & IER_TRANSMIT_EMPTY:
                    self.transmit_empty_pending = True  # enabling it while the holding register is empty asks at once
                self.ier = value & 0x0F
            case 2:
                self._control_fifo(value)
            case 3:
                self.lcr = value
            case 4:
                self.mcr = value & 0x1F
                self._update_modem_status()
                self._refill()
            case 7:
                self.scratch = value
            case _:  # LSR and MSR: for factory tests
                pass

    def _transmit(self, byte: int) -> None:
        # Writing clears the interrupt, sending raises it again: the line must be seen to fall in between.
        self.transmit_empty_pending = False
        self._update_line()
        if self.mcr & MCR_LOOP:
            if len(self.received) < self._capacity:
                self.received.append(byte)
            else:
                self.overrun = True
                if not self.fifo_enabled:
                    self.received[-1] = byte  # without FIFO the new byte destroys the old one
        else:
            self._sink(byte)
        self.transmit_empty_pending = True

    def _receive(self) -> int:
        byte = self.received.pop(0) if self.received else 0
        self._refill()
        return byte

    def _control_fifo(self, value: int) -> None:
        enable = bool(value & FCR_ENABLE)
        if enable != self.fifo_enabled or value & FCR_CLEAR_RECEIVER:
            self.received.clear()
        self.fifo_enabled = enable
        if enable:  # the other bits count only together with this one
            self.trigger = TRIGGER_LEVELS[value >> 6]
        self._refill()

    @property
    def _capacity(self) -> int:
        return FIFO_SIZE if self.fifo_enabled else 1

    def _refill(self) -> None:
        if self.mcr & MCR_LOOP:  # the receiver is disconnected from the wire
            return
        room = max(self._capacity - len(self.received), 0)
        self.received += self.backlog[:room]
        del self.backlog[:room]

    def _update_modem_status(self) -> None:
        if self.mcr & MCR_LOOP:  # RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD
            mcr = self.mcr
            lines = (mcr & 0x02) << 3 | (mcr & 0x01) << 5 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4
        else:
            lines = MSR_CONNECTED
        changed = (self.msr ^ lines) & 0xF0
        if lines & MSR_RING:  # the ring indicator's delta bit is set by its trailing edge only
            changed &= ~MSR_RING
        self.msr = lines | self.msr & MSR_DELTA | changed >> 4

    def _update_line(self) -> None:
        # A PC routes the interrupt through OUT2, which loopback holds inactive.
        connected = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        self._set_line(connected and self.interrupt() != IIR_NONE)
