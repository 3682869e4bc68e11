"""The real-time clock and CMOS memory at ports 0x70 and 0x71, after Motorola's MC146818 data sheet.

The time of day is `epoch_ns` + virtual time, in UTC, and what the guest set since. BCD and binary; always 24 hours.
Left out: alarm, periodic and update-ended interrupts (their enable bits are kept; register C reads 0), the update
cycle (UIP reads clear: a time read is always consistent) and daylight saving.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import ClassVar

from emulator.devices.state import Registers, Stateful, integer, integers

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
A_UIP = 0x80
B_SET, B_BINARY, B_24_HOURS = 0x80, 0x04, 0x02
D_VALID = 0x80
SIZE = 128

EPOCH = datetime(1970, 1, 1)
LAST = int((datetime(9999, 12, 31) - EPOCH).total_seconds())


class Rtc(Stateful):
    """The clock; `memory` holds the CMOS bytes, among them the time registers while the guest sets them."""

    STATE: ClassVar[Registers] = {
        "index": integer(SIZE - 1),
        "offset": integer(LAST, -LAST),
        "memory": integers(0xFF, SIZE, SIZE),
    }
    PORTS = (0x70, 0x71)

    def __init__(self, now: Callable[[], int], epoch_ns: int) -> None:
        """`now` gives virtual ns, `epoch_ns` the ns since 1970 (UTC) at virtual time 0."""
        self._now = now
        self._epoch_ns = epoch_ns
        self.index = 0
        self.offset = 0  # seconds the guest put the clock ahead
        self.memory = [0] * SIZE
        self.memory[REGISTER_A] = 0x26  # 32768 Hz time base
        self.memory[REGISTER_B] = B_24_HOURS
        self.memory[REGISTER_D] = D_VALID

    def port_read(self, port: int, size: int) -> int:
        """Read the indexed byte; the index itself cannot be read."""
        if port == 0x70:
            return 0xFF
        if self.index in TIME_REGISTERS and not self.memory[REGISTER_B] & B_SET:
            self._clock_to_memory()
        return self.memory[self.index]

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write the index (bit 7, the NMI mask, is ignored) or the indexed byte."""
        value &= 0xFF
        if port == 0x70:
            self.index = value & 0x7F
        elif self.index == REGISTER_A:
            self.memory[REGISTER_A] = value & ~A_UIP
        elif self.index == REGISTER_B:
            self._write_b(value | B_24_HOURS)
        elif self.index in TIME_REGISTERS and not self.memory[REGISTER_B] & B_SET:
            self._clock_to_memory()
            self.memory[self.index] = value
            self._memory_to_clock()
        elif self.index not in (REGISTER_C, REGISTER_D):
            self.memory[self.index] = value

    def _write_b(self, value: int) -> None:
        was, self.memory[REGISTER_B] = self.memory[REGISTER_B], value
        if value & ~was & B_SET:
            self._clock_to_memory()  # the clock stops being copied: the guest edits this copy
        elif was & ~value & B_SET:
            self._memory_to_clock()

    def _seconds(self) -> int:
        return (self._epoch_ns + self._now()) // 1_000_000_000

    def _clock_to_memory(self) -> None:
        time = EPOCH + timedelta(seconds=min(max(self._seconds() + self.offset, 0), LAST))
        century, year = divmod(time.year, 100)
        weekday = time.isoweekday() % 7 + 1  # Sunday is 1
        fields = (time.second, time.minute, time.hour, weekday, time.day, time.month, year, century)
        for register, field in zip(TIME_REGISTERS, fields, strict=True):
            self.memory[register] = field if self._binary else field // 10 << 4 | field % 10

    def _memory_to_clock(self) -> None:
        second, minute, hour, _, day, month, year, century = map(self._field, TIME_REGISTERS)
        try:
            time = datetime(century * 100 + year, month, day, hour, minute, second)
        except ValueError:  # no such moment: the chip would run on from nonsense, we keep the old time
            return
        self.offset = min(max(int((time - EPOCH).total_seconds()) - self._seconds(), -LAST), LAST)

    def _field(self, register: int) -> int:
        value = self.memory[register]
        return value if self._binary else (value >> 4) * 10 + (value & 0x0F)

    @property
    def _binary(self) -> bool:
        return bool(self.memory[REGISTER_B] & B_BINARY)
