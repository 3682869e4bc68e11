"""Stack traces of the guest's kernel by its own ORC tables: exact, and without frame pointers.

A table of instruction addresses (.orc_unwind_ip) and one of entries (.orc_unwind) say, for each stretch of the kernel's
text, where the caller's stack pointer, frame pointer and return address are: Documentation/arch/x86/orc-unwinder.rst.
They are read from the guest's RAM, which it may have damaged: every step goes up the stack or ends the trace.
A kernel built without CONFIG_UNWINDER_ORC has no tables, and traces end with the first entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from emulator.memory import BadAddress

if TYPE_CHECKING:
    from emulator.kernel.btf import Btf
    from emulator.kernel.kallsyms import Symbols

_WORD = (1 << 64) - 1
_ENTRY_SIZE = 6
_NEW_SP = 3
# Registers a stack or frame pointer is found by (arch/x86/include/asm/orc_types.h).
_PREV_SP, _BP, _SP, _BP_INDIRECT, _SP_INDIRECT = 1, 4, 5, 8, 9
_GENERAL = {2: "rdx", 3: "rdi", 6: "r10", 7: "r13"}
_OLD_REGISTERS: dict[int, int] = {number: number for number in range(16)}
_NEW_REGISTERS = {_NEW_SP: _SP, 4: _BP, 8: _PREV_SP, 9: _SP_INDIRECT}
_MOST = 256  # entries of one trace, as many as the kernel takes at most by default is 64

Read = Callable[[int, int], bytes]


class _Entry(NamedTuple):
    sp_offset: int
    bp_offset: int
    sp_reg: int
    bp_reg: int
    type: str


class Unwinder:
    """Makes stack traces. `read(address, size)` reads at a guest virtual address and raises BadAddress."""

    def __init__(self, symbols: Symbols, btf: Btf, read: Read) -> None:
        self._read = read
        self._text = (symbols["_stext"], symbols["_etext"])
        self._addresses = self._entries = self._count = 0
        if "__start_orc_unwind_ip" in symbols:
            self._addresses = symbols["__start_orc_unwind_ip"]
            self._entries = symbols["__start_orc_unwind"]
            self._count = (symbols["__stop_orc_unwind_ip"] - self._addresses) // 4
        # Linux 6.4 took the bit `end` out of an entry and renumbered its types.
        new = not any(member.name == "end" for member in btf.struct("orc_entry").members) if self._count else True
        self._types = ("", "", "call", "regs", "partial") if new else ("call", "regs", "partial", "")
        # Linux 7 renumbered the registers, which no type tells; at a function's entry SP it is. Of the new numbers only
        # those are known here that C functions and switches to the interrupt stack need.
        self._registers = _OLD_REGISTERS
        entry = self._find(symbols["schedule"])
        if entry is not None and entry.sp_reg == _NEW_SP:
            self._registers = _NEW_REGISTERS
        regs = {name: btf.offsetof("pt_regs", name) for name in ("ip", "cs", "sp", "bp")}
        self._ip, self._cs, self._sp, self._bp = regs["ip"], regs["cs"], regs["sp"], regs["bp"]

    def trace(self, registers: Mapping[str, int]) -> Iterator[int]:
        """Yield return addresses, the innermost first, from the registers at an instruction of the kernel's.

        `registers` has rip, rsp, rbp and the general ones by their names. The address the trace begins at is not in it.
        """
        ip, sp, bp = registers["rip"], registers["rsp"], registers["rbp"]
        exact = True  # ip is that of an instruction not executed yet, not a return address
        for depth in range(_MOST):
            entry = self._find(ip if exact else ip - 1)
            if entry is None:
                return
            try:
                frame = self._frame(entry, sp, bp, registers if depth == 0 else {})
                if frame is None:
                    return
                if entry.type == "call":
                    caller, below, exact = self._u64(frame - 8), frame, False
                else:
                    at = frame if entry.type == "regs" else frame - self._ip
                    if self._u64(at + self._cs) & 3:
                        return  # it was user mode that was interrupted
                    caller, below, exact = self._u64(at + self._ip), self._u64(at + self._sp), True
                bp = self._saved_bp(entry, frame, bp)
            except BadAddress:
                return
            if entry.type == "call" and below <= sp:
                return
            ip, sp = caller, below
            if not self._text[0] <= ip < self._text[1]:
                return
            yield ip

    def _u64(self, address: int) -> int:
        return int.from_bytes(self._read(address & _WORD, 8), "little")

    def _find(self, ip: int) -> _Entry | None:
        """Return the entry of the last address of the table that is not above `ip`."""
        low, high = 0, self._count
        try:
            while low < high:
                middle = (low + high) // 2
                at = self._addresses + 4 * middle
                if at + int.from_bytes(self._read(at, 4), "little", signed=True) <= ip:
                    low = middle + 1
                else:
                    high = middle
            if low == 0:
                return None
            data = self._read(self._entries + _ENTRY_SIZE * (low - 1), _ENTRY_SIZE)
        except BadAddress:
            return None
        kind = data[5] & 7 if len(self._types) == 5 else data[5] & 3
        if kind >= len(self._types) or not self._types[kind]:
            return None
        return _Entry(
            int.from_bytes(data[0:2], "little", signed=True),
            int.from_bytes(data[2:4], "little", signed=True),
            self._registers.get(data[4] & 15, 0),
            self._registers.get(data[4] >> 4, 0),
            self._types[kind],
        )

    def _frame(self, entry: _Entry, sp: int, bp: int, registers: Mapping[str, int]) -> int | None:
        """Return the stack pointer before the call, or where the registers were saved."""
        if entry.sp_reg == _SP:
            return sp + entry.sp_offset
        if entry.sp_reg == _BP:
            return bp + entry.sp_offset
        if entry.sp_reg == _SP_INDIRECT:
            return self._u64(sp) + entry.sp_offset
        if entry.sp_reg == _BP_INDIRECT:
            return self._u64(bp + entry.sp_offset)
        return registers.get(_GENERAL.get(entry.sp_reg, ""))

    def _saved_bp(self, entry: _Entry, frame: int, bp: int) -> int:
        if entry.type == "regs":
            return self._u64(frame + self._bp)
        if entry.bp_reg == _PREV_SP:
            return self._u64(frame + entry.bp_offset)
        if entry.bp_reg == _BP:
            return self._u64(bp + entry.bp_offset)
        return bp
