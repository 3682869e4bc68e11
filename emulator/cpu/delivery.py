"""Delivery of exceptions and interrupts for the slow CPU: through a gate of the IDT, onto a stack, with a frame.

As in the Intel SDM (vol. 3, 6.14: 64-bit mode), by changing a saved context. The guest's tables and stack are reached
as the processor itself reaches them, by its page tables.
"""

from __future__ import annotations

import ctypes
import struct

from emulator.cpu import context as saved
from emulator.cpu.context import Context
from emulator.cpu.interface import GuestDied
from emulator.cpu.libunicorn import Engine

FLAT_LIMIT = 0xFFFFFFFF
"""Of a segment that is all of memory."""

_PAGE = 4096
_FRAME = 0x000F_FFFF_FFFF_F000
_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE = 1, 2, 1 << 5, 1 << 6, 1 << 7
_DOUBLE_FAULT, _INVALID_TSS, _NOT_PRESENT, _STACK, _PROTECTION, _PAGE_FAULT = 8, 10, 11, 12, 13, 14
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_INTERRUPT_GATE, _TRAP_GATE = 14, 15
_TF, _IF, _NT, _RF, _VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17


class Fault(Exception):
    """An exception of the guest's that comes of an access for the CPU itself."""

    def __init__(self, vector: int, error_code: int, address: int | None = None) -> None:
        super().__init__(vector, error_code)
        self.vector = vector
        self.error_code = error_code
        self.address = address


class Delivery:
    """Delivers events to the guest of one engine, whose state `context` holds."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self._engine = engine
        self._context = context
        self._ram: list[tuple[int, memoryview]] = []

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        """Know memory of this process that is the guest's RAM at a physical address (bytes)."""
        self._ram.append((physical, memoryview((ctypes.c_char * size).from_address(host_address)).cast("B")))

    def close(self) -> None:
        """Let go of the memory."""
        for _, view in self._ram:
            view.release()
        self._ram.clear()

    def deliver(self, vector: int, error_code: int | None = None, software: bool = False) -> None:
        """Enter the handler of an exception or interrupt; the context is freshly saved and goes back changed.

        What fails on the way becomes an exception of its own, or a double fault (SDM vol. 3, table 6-5).
        Raises GuestDied for a triple fault.
        """
        raised = error_code is not None or (vector < 32 and not software)
        while True:
            try:
                self._enter(vector, error_code, software)
                return
            except Fault as fault:
                if vector == _DOUBLE_FAULT and raised:
                    at = self._context.u64(saved.RIP)
                    raise GuestDied(f"the guest's CPU stopped at {at:#x}: triple fault") from None
                if fault.address is not None:
                    self._context.set_u64(saved.CR2, fault.address)
                contributory = fault.vector in _CONTRIBUTORY
                double = raised and (
                    (vector in _CONTRIBUTORY and contributory)
                    or (vector == _PAGE_FAULT and (contributory or fault.vector == _PAGE_FAULT))
                )
                vector, error_code = (_DOUBLE_FAULT, 0) if double else (fault.vector, fault.error_code)
                raised, software = True, False

    def _enter(self, vector: int, error_code: int | None, software: bool) -> None:
        """Go through the gate of a vector. Nothing in the context changes before all that can fail is done."""
        state = self._context
        cpl = state.u32(saved.HFLAGS) & saved.HF_CPL
        handler, selector, ist, gate_type = self._gate(vector, cpl if software else 0)
        code_flags, dpl = self._code_segment(selector, cpl)
        changes_stack = dpl < cpl or ist != 0
        rsp = self._stack_pointer(ist + 3 if ist else dpl) if changes_stack else state.u64(saved.RSP)
        rflags = self._engine.read("rflags")
        frame = struct.pack(
            "<5Q",
            state.u64(saved.RIP), state.selector(saved.CS), rflags, state.u64(saved.RSP), state.selector(saved.SS),
        )  # fmt: skip
        if error_code is not None:
            frame = struct.pack("<Q", error_code) + frame
        rsp = (rsp & ~15) - len(frame) & (1 << 64) - 1
        self._write(rsp, frame)
        hflags = state.u32(saved.HFLAGS) & ~(saved.HF_CPL | saved.HF_INHIBIT_IRQ | saved.HF_ADDSEG)
        if changes_stack:
            state.set_segment(saved.SS, dpl, 0, dpl << 13)
            hflags &= ~saved.HF_SS32
        state.set_segment(saved.CS, selector & ~3 | dpl, FLAT_LIMIT, code_flags)
        state.set_u32(saved.HFLAGS, hflags | dpl | saved.HF_CS32 | saved.HF_CS64)
        cleared = _TF | _NT | _RF | _VM | (_IF if gate_type == _INTERRUPT_GATE else 0)
        state.set_u64(saved.EFLAGS, state.u64(saved.EFLAGS) & ~cleared)
        state.set_u64(saved.RSP, rsp)
        state.set_u64(saved.RIP, handler)
        state.set_u32(saved.OLD_EXCEPTION, saved.NONE)
        state.restore()

    def _gate(self, vector: int, cpl: int) -> tuple[int, int, int, int]:
        """Return handler, code selector, IST number and type of a vector's gate in the IDT."""
        base, limit = self._table(saved.IDTR)
        error = vector * 16 + 2
        if vector * 16 + 15 > limit:
            raise Fault(_PROTECTION, error)
        low, high = struct.unpack("<2Q", self.read(base + 16 * vector, 16))
        gate_type = low >> 40 & 0x1F
        if gate_type not in (_INTERRUPT_GATE, _TRAP_GATE) or low >> 45 & 3 < cpl:
            raise Fault(_PROTECTION, error)
        if not low >> 47 & 1:
            raise Fault(_NOT_PRESENT, error)
        handler = low & 0xFFFF | low >> 32 & 0xFFFF0000 | (high & 0xFFFFFFFF) << 32
        return handler, low >> 16 & 0xFFFF, low >> 32 & 7, gate_type

    def _code_segment(self, selector: int, cpl: int) -> tuple[int, int]:
        """Return the second word of a 64-bit code descriptor in the GDT and the privilege level it leads to."""
        base, limit = self._table(saved.GDTR)
        error = selector & 0xFFFC
        if not error or selector & 4 or (selector | 7) > limit:
            raise Fault(_PROTECTION, error)
        flags = int.from_bytes(self.read(base + (selector & ~7) + 4, 4), "little")
        dpl = flags >> 13 & 3
        is_code, is_long = flags & 0x1800 == 0x1800, flags >> 21 & 3 == 1
        if not is_code or not is_long or dpl > cpl:
            raise Fault(_PROTECTION, error)
        if not flags >> 15 & 1:
            raise Fault(_NOT_PRESENT, error)
        return flags, cpl if flags >> 10 & 1 else dpl

    def _stack_pointer(self, index: int) -> int:
        """Return RSP0..2 (index 0..2) or IST1..7 (index 4..10) of the task state segment."""
        base, limit = self._table(saved.TR)
        if 8 * index + 11 > limit:
            raise Fault(_INVALID_TSS, 0)
        return int.from_bytes(self.read(base + 8 * index + 4, 8), "little")

    def _table(self, register: int) -> tuple[int, int]:
        return self._context.u64(register + saved.BASE), self._context.u32(register + saved.LIMIT)

    # ---- guest memory, by supervisor accesses

    def _physical(self, address: int, size: int) -> memoryview:
        for start, view in self._ram:
            if start <= address and address + size <= start + len(view):
                return view[address - start : address - start + size]
        raise GuestDied(f"the guest's page tables lead to physical {address:#x}, where there is no RAM")

    def _translate(self, virtual: int, write: bool) -> int:
        """Walk the page tables (SDM vol. 3, 4.5), setting accessed and dirty bits; #PF as for a supervisor."""
        error = 2 if write else 0
        table = self._context.u64(saved.CR3) & _FRAME
        for shift in (39, 30, 21, 12):
            cell = self._physical(table + (virtual >> shift & 511) * 8, 8)
            entry = int.from_bytes(cell, "little")
            if not entry & _PRESENT:
                raise Fault(_PAGE_FAULT, error, virtual)
            if write and not entry & _WRITABLE:
                raise Fault(_PAGE_FAULT, error | 1, virtual)
            leaf = shift == 12 or (shift < 39 and entry & _LARGE)
            used = entry | _ACCESSED | (_DIRTY if leaf and write else 0)
            if used != entry:
                cell[:] = used.to_bytes(8, "little")
            if leaf:
                below = (1 << shift) - 1
                return entry & _FRAME & ~below | virtual & below
            table = entry & _FRAME
        raise AssertionError

    def read(self, virtual: int, size: int) -> bytes:
        """Return what is at a guest virtual address. Raises Fault; GuestDied where page tables lead nowhere."""
        first = min(size, _PAGE - virtual % _PAGE)
        data = bytes(self._physical(self._translate(virtual, False), first))
        return data if first == size else data + self.read(virtual + first, size - first)

    def _write(self, virtual: int, data: bytes) -> None:
        if virtual + (1 << 47) & (1 << 64) - 1 >= 1 << 48:
            raise Fault(_STACK, 0)
        first = min(len(data), _PAGE - virtual % _PAGE)
        self._physical(self._translate(virtual, True), first)[:] = data[:first]
        if first < len(data):
            self._write(virtual + first, data[first:])
