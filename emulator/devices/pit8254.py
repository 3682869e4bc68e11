"""The 8254 interval timer of a PC, after Intel's 8254 data sheet (231164): three counters at ports 0x40-0x43.

Time is virtual ns turned into clock pulses by integer arithmetic, so nothing drifts. Nothing runs between calls: a
counter knows at which pulse it was loaded, and everything else follows from the present pulse.

Left out: BCD (the bit is kept and reads back, counting is binary). In modes 2 and 3 a count written while counting
takes over at the end of the whole cycle, also in mode 3 where the chip does so after half of it. In mode 3 the
interrupt line falls just before it rises, not half a period earlier: only the rising edge is a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emulator.devices.state import TIME_MAX, Registers, Stateful, flag, integer, optional

#: Clock of the timer in Hz: the colour burst crystal, 14.31818 MHz, divided by 12.
FREQUENCY = 1193182
SECOND = 1_000_000_000

LOW_BYTE, HIGH_BYTE, BOTH_BYTES = 1, 2, 3


def pulses(ns: int) -> int:
    """Return the number of clock pulses in the first `ns` of virtual time."""
    return ns * FREQUENCY // SECOND


def time_of(pulse: int) -> int:
    """Return the first virtual ns at which `pulse` has happened: the inverse of `pulses`."""
    return -(-pulse * SECOND // FREQUENCY)


class Counter(Stateful):
    """One of the three counters; all its times are clock pulses."""

    STATE: ClassVar[Registers] = {
        "mode": integer(5),
        "access": integer(BOTH_BYTES, LOW_BYTE),
        "bcd": flag,
        "gate": flag,
        "count": integer(0x10000, 1),
        "start": optional(integer(TIME_MAX)),
        "paused": optional(integer(TIME_MAX)),
        "next_count": optional(integer(0x10000, 1)),
        "next_start": integer(TIME_MAX),
        "low_written": optional(integer(0xFF)),
        "high_next": flag,
        "latched": optional(integer(0xFFFF)),
        "latched_status": optional(integer(0xFF)),
        "edge": optional(integer(TIME_MAX)),
    }

    def __init__(self, gate: bool) -> None:
        self.mode = 2
        self.access = BOTH_BYTES
        self.bcd = False
        self.gate = gate
        self.count = 0x10000
        self.start: int | None = None  # pulse at which the count was loaded; None: not loaded, or not triggered
        self.paused: int | None = None  # pulses counted when the gate fell in mode 0 or 4
        self.next_count: int | None = None  # count that takes over at pulse next_start (modes 2 and 3) or trigger
        self.next_start = 0
        self.low_written: int | None = None  # first byte of a count whose second is still to come
        self.high_next = False
        self.latched: int | None = None
        self.latched_status: int | None = None
        self.edge: int | None = None  # pulse of the next rising edge of OUT that has not been reported

    def control(self, access: int, mode: int, bcd: bool) -> None:
        """Take a control word: the counter stops until a count is written."""
        self.mode = mode - 4 if mode > 5 else mode
        self.access = access
        self.bcd = bcd
        self.start = self.paused = self.next_count = self.low_written = self.edge = None
        self.latched = self.latched_status = None
        self.high_next = False

    def write(self, byte: int, pulse: int) -> bool:
        """Take a byte of the count; tell whether that touched the counting."""
        if self.access == LOW_BYTE:
            self._set_count(byte, pulse)
        elif self.access == HIGH_BYTE:
            self._set_count(byte << 8, pulse)
        elif self.low_written is None:
            self.low_written = byte
            if self.mode == 0:
                self.start = self.paused = self.edge = None  # the first byte stops the count
            return self.mode == 0
        else:
            low, self.low_written = self.low_written, None
            self._set_count(byte << 8 | low, pulse)
        return True

    def read(self, pulse: int) -> int:
        """Read the latched status, else a byte of the latched or running count."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.latched if self.latched is not None else self.value(pulse)
        high = self.access == HIGH_BYTE or (self.access == BOTH_BYTES and self.high_next)
        if self.access == BOTH_BYTES:
            self.high_next = not self.high_next
        if high or self.access == LOW_BYTE:
            self.latched = None
        return value >> 8 if high else value & 0xFF

    def latch_count(self, pulse: int) -> None:
        """Hold the count for reading; a second latch before that is ignored."""
        if self.latched is None:
            self.latched = self.value(pulse)

    def latch_status(self, pulse: int) -> None:
        """Hold the status byte for reading."""
        if self.latched_status is None:
            out, null = self.out(pulse), self._is_null(pulse)
            self.latched_status = out << 7 | null << 6 | self.access << 4 | self.mode << 1 | self.bcd

    def set_gate(self, gate: bool, pulse: int) -> None:
        """Drive GATE: pauses modes 0 and 4, stops and restarts 2 and 3, triggers 1 and 5 when it rises."""
        if gate == self.gate:
            return
        self._take_over(pulse)
        self.gate = gate
        if self.mode in (0, 4):
            if not gate and self.start is not None:
                self.paused = max(pulse - self.start, 0)
            elif gate and self.paused is not None:
                self._load(max(pulse - self.paused, 0))
                self.paused = None
        elif gate:
            if self.next_count is not None:
                self.count, self.next_count = self.next_count, None
                self._load(pulse + 1)
            elif self.start is not None or self.paused is not None:
                self._load(pulse + 1)
            self.paused = None
        elif self.mode in (2, 3) and self.start is not None:
            self.paused = self._elapsed(pulse)

    def value(self, pulse: int) -> int:
        """Return the counting element at `pulse`, 16 bits."""
        self._take_over(pulse)
        if self.start is None:
            return self.count & 0xFFFF
        done = self._elapsed(pulse)
        if self.mode == 2:
            done %= self._period
        elif self.mode == 3:
            even, half = self.count & ~1, (self.count + 1) // 2
            phase = done % self._period
            return (even - 2 * (phase if phase < half else phase - half)) & 0xFFFF
        return (self.count - done) & 0xFFFF

    def out(self, pulse: int) -> bool:
        """Return the level of OUT at `pulse`."""
        self._take_over(pulse)
        if self.start is None:
            return self.mode != 0
        if self.mode in (2, 3) and not self.gate:
            return True
        if pulse < self.start:  # loaded by the next pulse only
            return self.mode != 0
        done = self._elapsed(pulse)
        match self.mode:
            case 0 | 1:
                return done >= self.count
            case 2:
                return done % self._period != self._period - 1
            case 3:
                return done % self._period < (self.count + 1) // 2
            case _:
                return done != self.count

    def take_edge(self, pulse: int) -> bool:
        """Tell whether OUT has risen by `pulse` since last asked; several rises count as one, the phase stays."""
        self._take_over(pulse)
        if self.edge is None or self.edge > pulse:
            return False
        if self.mode in (2, 3) and self.start is not None:
            self.edge += ((pulse - self.edge) // self._period + 1) * self._period
        else:
            self.edge = None
        return True

    @property
    def _period(self) -> int:
        return max(self.count, 2)  # a count of 1 is illegal in modes 2 and 3

    def _elapsed(self, pulse: int) -> int:
        if self.paused is not None:
            return self.paused
        return 0 if self.start is None else max(pulse - self.start, 0)

    def _is_null(self, pulse: int) -> bool:
        """Tell whether the last count written has not reached the counting element yet."""
        self._take_over(pulse)
        return self.next_count is not None or self.start is None or pulse < self.start

    def _set_count(self, written: int, pulse: int) -> None:
        count = written or 0x10000
        if self.mode in (1, 5):  # waits for a trigger
            self.next_count = count
            return
        self._take_over(pulse)
        if self.mode in (2, 3) and self.start is not None and self.paused is None:
            cycles = max(pulse - self.start, 0) // self._period + 1
            self.next_count, self.next_start = count, self.start + cycles * self._period
            return
        self.count, self.paused = count, None
        self._load(pulse + 1)  # the next pulse loads the count and does not count
        if not self.gate:
            self.paused = 0

    def _load(self, start: int) -> None:
        self.start = start
        # Modes 4 and 5 pull OUT low for one pulse: the edge is its end.
        self.edge = start + (self.count + 1 if self.mode in (4, 5) else self._period if self.mode > 1 else self.count)

    def _take_over(self, pulse: int) -> None:
        if self.next_count is not None and self.mode in (2, 3) and self.paused is None and pulse >= self.next_start:
            unreported = self.edge if self.edge is not None and self.edge <= self.next_start else None
            self.count, self.next_count = self.next_count, None
            self._load(self.next_start)
            if unreported is not None:
                self.edge = self.next_start


class Pit8254(Stateful):
    """The timer chip: counter 0 drives interrupt line 0 through `set_line`, counter 2 belongs to port 0x61."""

    PORTS = range(0x40, 0x44)

    def __init__(self, now: Callable[[], int], set_line: Callable[[bool], None]) -> None:
        """`now` gives virtual ns; nothing counts and no line changes until the guest programs a counter."""
        self._now = now
        self._set_line = set_line
        self.counters = [Counter(gate=True), Counter(gate=True), Counter(gate=False)]

    def parts(self) -> dict[str, Stateful]:
        return {f"counter{index}": counter for index, counter in enumerate(self.counters)}

    def next_event(self) -> int | None:
        """Return the virtual ns of the next interrupt request, None when none will come."""
        counter = self.counters[0]
        if counter.edge is None or not counter.gate:
            return None
        return time_of(counter.edge)

    def advance(self, now_ns: int) -> None:
        """Raise line 0 if its time has come by `now_ns`; periods missed collapse into one request."""
        if self.counters[0].take_edge(pulses(now_ns)):
            self._set_line(False)
            self._set_line(True)

    def set_gate2(self, gate: bool) -> None:
        """Drive GATE of counter 2 (port 0x61 bit 0)."""
        self.counters[2].set_gate(gate, pulses(self._now()))

    def out2(self) -> bool:
        """Return OUT of counter 2 (port 0x61 bit 5)."""
        return self.counters[2].out(pulses(self._now()))

    def port_read(self, port: int, size: int) -> int:
        """Read a counter's byte; the control word register cannot be read."""
        if port == 0x43:
            return 0xFF
        return self.counters[port & 3].read(pulses(self._now()))

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write a counter's byte, or a control word, latch or read-back command."""
        now = self._now()
        self.advance(now)
        pulse = pulses(now)
        if port != 0x43:
            if self.counters[port & 3].write(value & 0xFF, pulse) and port == 0x40 and self.counters[0].mode == 0:
                self._set_line(False)
            return
        select, access = value >> 6 & 3, value >> 4 & 3
        if select == 3:
            self._read_back(value, pulse)
        elif access == 0:
            self.counters[select].latch_count(pulse)
        else:
            was_high = self.counters[select].out(pulse)
            self.counters[select].control(access, value >> 1 & 7, bool(value & 1))
            is_high = self.counters[select].mode != 0
            if select == 0 and is_high != was_high:
                self._set_line(is_high)

    def _read_back(self, command: int, pulse: int) -> None:
        for index, counter in enumerate(self.counters):
            if command >> index & 2:
                if not command & 0x20:
                    counter.latch_count(pulse)
                if not command & 0x10:
                    counter.latch_status(pulse)
