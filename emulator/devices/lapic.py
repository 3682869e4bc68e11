"""A local APIC in xAPIC mode, after Intel's SDM volume 3, chapter "Advanced Programmable Interrupt Controller (APIC)".

One processor's own interrupt controller: 32-bit registers at physical 0xfee00000, its timer (one-shot, periodic,
TSC-deadline) and the interrupts processors send one another. What goes to another processor, and whatever is not a
plain vector (NMI, INIT, start-up), is handed to `send`; the machine routes it, with `addressed_by` and `post`.

Left out: x2APIC, I/O APIC (so level-triggered vectors: TMR reads 0), arbitration, the thermal and performance
counters behind two of the LVT entries (they are stored), CMCI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from emulator.devices.state import TIME_MAX, Registers, Stateful, integer, integers, optional

PHYSICAL_BASE = 0xFEE00000
SIZE = 0x1000
#: Integrated APIC, version 0x14, six LVT entries (highest index 5).
VERSION = 0x50014
SECOND = 1_000_000_000


class Register:
    """Offsets of the registers from the base, in bytes; ISR, TMR and IRR are eight registers 16 bytes apart."""

    ID = 0x020
    VERSION = 0x030
    TPR = 0x080
    APR = 0x090
    PPR = 0x0A0
    EOI = 0x0B0
    RRD = 0x0C0
    LDR = 0x0D0
    DFR = 0x0E0
    SVR = 0x0F0
    ISR = 0x100
    TMR = 0x180
    IRR = 0x200
    ESR = 0x280
    ICR_LOW = 0x300
    ICR_HIGH = 0x310
    LVT_TIMER = 0x320
    LVT_THERMAL = 0x330
    LVT_PERFORMANCE = 0x340
    LVT_LINT0 = 0x350
    LVT_LINT1 = 0x360
    LVT_ERROR = 0x370
    INITIAL_COUNT = 0x380
    CURRENT_COUNT = 0x390
    DIVIDE = 0x3E0


#: LVT register -> its writable bits, in the order in which `Lapic.lvt` stores them.
LVT_WRITABLE = {
    Register.LVT_TIMER: 0x700FF,
    Register.LVT_THERMAL: 0x107FF,
    Register.LVT_PERFORMANCE: 0x107FF,
    Register.LVT_LINT0: 0x1A7FF,
    Register.LVT_LINT1: 0x1A7FF,
    Register.LVT_ERROR: 0x100FF,
}
LVT_INDEX = {register: index for index, register in enumerate(LVT_WRITABLE)}
MASKED = 0x10000
ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1, 2
SVR_ENABLED = 0x100
SVR_WRITABLE = 0x13FF
#: Delivery modes, bits 10-8 of the ICR and the LVT.
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
#: Destination shorthands, bits 19-18 of the ICR.
NO_SHORTHAND, SELF, ALL, ALL_BUT_SELF = range(4)
BROADCAST = 0xFF
ERROR_SEND_VECTOR, ERROR_RECEIVE_VECTOR, ERROR_REGISTER = 0x20, 0x40, 0x80
#: Vectors 0-15 are the processor's own.
FIRST_VECTOR = 16
READ_AS_ZERO = (Register.APR, Register.EOI, Register.RRD)


class Ipi(NamedTuple):
    """An interrupt one processor sends: what the ICR said."""

    mode: int  # FIXED, LOWEST_PRIORITY, SMI, NMI, INIT or STARTUP
    vector: int  # for STARTUP the physical page number of the code to start
    destination: int  # APIC id, or mask when logical
    logical: bool
    shorthand: int
    asserted: bool  # the level bit: an INIT without it is the old synchronisation message


class Lapic(Stateful):
    """One processor's local APIC."""

    STATE: ClassVar[Registers] = {
        "tpr": integer(0xFF),
        "ldr": integer(0xFF),
        "dfr": integer(0x0F),
        "svr": integer(SVR_WRITABLE),
        "isr": integer((1 << 256) - 1),
        "irr": integer((1 << 256) - 1),
        "errors": integer(0xFF),
        "esr": integer(0xFF),
        "icr_low": integer(0xFFFFFFFF),
        "icr_high": integer(0xFF),
        "lvt": integers(0x7FFFF, len(LVT_WRITABLE), len(LVT_WRITABLE)),
        "initial_count": integer(0xFFFFFFFF),
        "divide": integer(0x0B),
        "start": integer(TIME_MAX),
        "start_count": integer(0xFFFFFFFF),
        "tsc_deadline": optional(integer((1 << 64) - 1, 1)),
    }

    def __init__(
        self,
        now: Callable[[], int],
        apic_id: int = 0,
        send: Callable[[Ipi], None] = lambda ipi: None,
        bus_hz: int = SECOND,
    ) -> None:
        """`now` gives virtual ns, which is also the TSC (1 GHz); `bus_hz` is the timer's clock before its divider."""
        self._now = now
        self._send = send
        self._bus_hz = bus_hz
        self.apic_id = apic_id
        self.reset()

    def reset(self) -> None:
        """Put every register into its state after power-up or INIT; the id stays."""
        self.tpr = 0
        self.ldr = 0  # bits 31-24
        self.dfr = 0x0F  # bits 31-28: flat
        self.svr = 0xFF
        self.isr = self.irr = 0  # bit n is vector n
        self.errors = self.esr = 0  # errors since ESR was written, and those before, which are read
        self.icr_low = self.icr_high = 0
        self.lvt = [MASKED] * len(LVT_WRITABLE)
        self.initial_count = 0
        self.divide = 0
        self.start = 0  # bus clock cycle at which the timer held start_count
        self.start_count = 0  # 0: stopped
        self.tsc_deadline: int | None = None

    # Delivery to the processor

    @property
    def enabled(self) -> bool:
        """Software enable, SVR bit 8."""
        return bool(self.svr & SVR_ENABLED)

    @property
    def accepts_extint(self) -> bool:
        """Whether the 8259's interrupts reach the processor: LINT0 as ExtINT, or the APIC not enabled yet."""
        lint0 = self.lvt[LVT_INDEX[Register.LVT_LINT0]]
        return not self.enabled or (not lint0 & MASKED and lint0 >> 8 & 7 == EXTINT)

    @property
    def ppr(self) -> int:
        """Processor priority: the higher of the task priority and the class of the vector in service."""
        serving = _highest(self.isr) & 0xF0
        return self.tpr if self.tpr & 0xF0 >= serving else serving

    def post(self, vector: int) -> None:
        """Request a fixed, edge-triggered `vector`."""
        if not self.enabled:
            return
        if vector < FIRST_VECTOR:
            self._error(ERROR_RECEIVE_VECTOR)
        else:
            self.irr |= 1 << vector

    def pending(self) -> int | None:
        """Return the vector that may interrupt the processor now, None when there is none."""
        if not self.irr or not self.enabled:
            return None
        vector = _highest(self.irr)
        return vector if vector & 0xF0 > self.ppr & 0xF0 else None

    def acknowledge(self) -> int:
        """Put the pending vector in service and return it; the spurious vector when there is none."""
        vector = self.pending()
        if vector is None:
            return self.svr & 0xFF
        self.irr &= ~(1 << vector)
        self.isr |= 1 << vector
        return vector

    def addressed_by(self, ipi: Ipi, from_self: bool = False) -> bool:
        """Tell whether `ipi` is meant for this processor."""
        if ipi.shorthand != NO_SHORTHAND:
            return ipi.shorthand == ALL or (ipi.shorthand == SELF) == from_self
        if ipi.destination == BROADCAST:
            return True
        if not ipi.logical:
            return ipi.destination == self.apic_id
        if self.dfr == 0x0F:  # flat: a bit for each of eight processors
            return bool(ipi.destination & self.ldr)
        return ipi.destination >> 4 == self.ldr >> 4 and bool(ipi.destination & self.ldr & 0x0F)

    # Registers

    def read(self, offset: int) -> int:
        """Read the 32-bit register at `offset` bytes from the base."""
        if not offset & 0x0F:
            if offset in LVT_INDEX:
                return self.lvt[LVT_INDEX[offset]]
            if Register.ISR <= offset < Register.ESR:
                bank = (self.isr, 0, self.irr)[(offset - Register.ISR) >> 7]
                return bank >> (offset & 0x70) * 2 & 0xFFFFFFFF
        match offset:
            case Register.ID:
                return self.apic_id << 24
            case Register.VERSION:
                return VERSION
            case Register.TPR:
                return self.tpr
            case Register.PPR:
                return self.ppr
            case Register.LDR:
                return self.ldr << 24
            case Register.DFR:
                return self.dfr << 28 | 0x0FFFFFFF
            case Register.SVR:
                return self.svr
            case Register.ESR:
                return self.esr
            case Register.ICR_LOW:
                return self.icr_low
            case Register.ICR_HIGH:
                return self.icr_high << 24
            case Register.INITIAL_COUNT:
                return self.initial_count
            case Register.CURRENT_COUNT:
                return self._current_count()
            case Register.DIVIDE:
                return self.divide
        if offset not in READ_AS_ZERO:
            self._error(ERROR_REGISTER)
        return 0

    def write(self, offset: int, value: int) -> None:
        """Write the 32-bit register at `offset` bytes from the base; writing a read-only one does nothing."""
        value &= 0xFFFFFFFF
        if offset in LVT_INDEX:
            self._write_lvt(offset, value)
            return
        match offset:
            case Register.TPR:
                self.tpr = value & 0xFF
            case Register.EOI:
                self.isr &= ~(1 << _highest(self.isr))
            case Register.LDR:
                self.ldr = value >> 24
            case Register.DFR:
                self.dfr = value >> 28
            case Register.SVR:
                self.advance(self._now())
                self.svr = value & SVR_WRITABLE
                if not self.enabled:
                    self.lvt = [entry | MASKED for entry in self.lvt]
            case Register.ESR:
                self.esr, self.errors = self.errors, 0
            case Register.ICR_LOW:
                self.icr_low = value & 0xCCFFF
                self._send_ipi()
            case Register.ICR_HIGH:
                self.icr_high = value >> 24
            case Register.INITIAL_COUNT:
                self._write_initial_count(value)
            case Register.DIVIDE:
                self._write_divide(value & 0x0B)
            case _:
                if not _exists(offset):
                    self._error(ERROR_REGISTER)

    def _write_lvt(self, offset: int, value: int) -> None:
        self.advance(self._now())  # what was due under the old entry comes first
        index = LVT_INDEX[offset]
        old, new = self.lvt[index], value & LVT_WRITABLE[offset]
        if not self.enabled:
            new |= MASKED
        self.lvt[index] = new
        if offset == Register.LVT_TIMER and (old >> 17 == TSC_DEADLINE) != (new >> 17 == TSC_DEADLINE):
            self.start_count = 0  # changing to or from TSC-deadline mode disarms the timer
            self.tsc_deadline = None

    def _send_ipi(self) -> None:
        low = self.icr_low
        mode = low >> 8 & 7
        ipi = Ipi(mode, low & 0xFF, self.icr_high, bool(low & 0x800), low >> 18 & 3, bool(low & 0x4000))
        if mode not in (FIXED, LOWEST_PRIORITY):
            self._send(ipi)
            return
        if ipi.vector < FIRST_VECTOR:
            self._error(ERROR_SEND_VECTOR)
            return
        here = self.addressed_by(ipi, from_self=True)
        if here:
            self.post(ipi.vector)
        only_here = here and (mode == LOWEST_PRIORITY or self._is_only_self(ipi))
        if not only_here:
            self._send(ipi)

    def _is_only_self(self, ipi: Ipi) -> bool:
        if ipi.shorthand != NO_SHORTHAND:
            return ipi.shorthand == SELF
        return ipi.destination != BROADCAST and (not ipi.logical or ipi.destination == self.ldr)

    def _error(self, bit: int) -> None:
        self.errors |= bit
        entry = self.lvt[LVT_INDEX[Register.LVT_ERROR]]
        if not entry & MASKED and entry & 0xFF >= FIRST_VECTOR:
            self.post(entry & 0xFF)

    # Timer

    def set_tsc_deadline(self, value: int) -> None:
        """Write IA32_TSC_DEADLINE (MSR 0x6e0): 0 disarms, a past time fires at once, another mode ignores it."""
        if self._timer_mode == TSC_DEADLINE:
            self.tsc_deadline = value & (1 << 64) - 1 or None
            self.advance(self._now())

    def next_event(self) -> int | None:
        """Return the virtual ns of the timer's next interrupt, None when it is stopped or masked."""
        if self._timer_entry & MASKED:
            return None
        if self._timer_mode == TSC_DEADLINE:
            return self.tsc_deadline
        if not self.start_count:
            return None
        return -(-(self.start + self.start_count * self._divisor) * SECOND // self._bus_hz)

    def advance(self, now_ns: int) -> None:
        """Let the timer expire if it is due by `now_ns`; periods missed collapse into one, the phase stays."""
        if self._timer_mode == TSC_DEADLINE:
            if self.tsc_deadline is None or self.tsc_deadline > now_ns:
                return
            self.tsc_deadline = None
        else:
            if not self.start_count:
                return
            late = self._cycles(now_ns) - self.start - self.start_count * self._divisor
            if late < 0:
                return
            if self._timer_mode == PERIODIC and self.initial_count:
                self.start = self._cycles(now_ns) - late % (self.initial_count * self._divisor)
                self.start_count = self.initial_count
            else:
                self.start_count = 0
        if not self._timer_entry & MASKED:
            self.post(self._timer_entry & 0xFF)

    @property
    def _timer_entry(self) -> int:
        return self.lvt[0]

    @property
    def _timer_mode(self) -> int:
        return self.lvt[0] >> 17 & 3

    @property
    def _divisor(self) -> int:
        exponent = (self.divide & 0x08) >> 1 | self.divide & 0x03  # 0 is by 2, 6 by 128, 7 by 1
        return 1 << (exponent + 1 & 7)

    def _cycles(self, ns: int) -> int:
        return ns * self._bus_hz // SECOND

    def _current_count(self) -> int:
        self.advance(self._now())
        if not self.start_count:
            return 0
        elapsed = max(self._cycles(self._now()) - self.start, 0) // self._divisor
        return max(self.start_count - elapsed, 0)

    def _write_initial_count(self, value: int) -> None:
        self.advance(self._now())
        if self._timer_mode != TSC_DEADLINE:
            self.initial_count = self.start_count = value
            self.start = self._cycles(self._now())

    def _write_divide(self, value: int) -> None:
        self.start_count = self._current_count()  # the rest of the count goes on at the new pace
        self.start = self._cycles(self._now())
        self.divide = value


def _highest(bits: int) -> int:
    """Return the number of the highest bit set, 0 when none is."""
    return max(bits.bit_length() - 1, 0)


def _exists(offset: int) -> bool:
    read_only = (Register.ID, Register.VERSION, Register.APR, Register.PPR, Register.RRD, Register.CURRENT_COUNT)
    return offset in read_only or (Register.ISR <= offset < Register.ESR and not offset & 0x0F)
