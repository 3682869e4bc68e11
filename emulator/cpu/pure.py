"""The slow CPU: Unicorn through its public API alone, everything a PC adds done here in Python.

The fallback where `native` cannot work, and the twin it is checked against. Exceptions, interrupts and SYSCALL are
delivered as in the Intel SDM (vol. 3, 6.14: 64-bit mode) by changing a saved context. Unlike the native CPU's, its
clock counts instructions, 1 ns each, in slices: a slice that ends early counts only the ticks its RDTSC reads and
port accesses took. Both clocks are deterministic, but they are different clocks.
"""

from __future__ import annotations

import ctypes
import select
import struct
from collections.abc import Sequence
from ctypes import CFUNCTYPE, c_int, c_uint32, c_uint64, c_void_p
from functools import cache

from emulator.cpu import context as saved
from emulator.cpu.context import Context
from emulator.cpu.interface import TSC_KHZ, GuestDied, PortIO, Stop
from emulator.cpu.layout import FEATURE_WORDS
from emulator.cpu.libunicorn import (
    HOOK_BLOCK,
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    INS_CPUID,
    INS_RDTSC,
    INS_RDTSCP,
    INS_SYSCALL,
    Engine,
    UnicornError,
)
from emulator.cpu.unicorn_cpu import FEATURES_OFF, FEATURES_ON, HYPERCALL_LEAF, MAX_WATCHED, UnicornCPU
from emulator.errors import EmulatorError

# Instructions between two looks at the stop word, the descriptors and the deadline; about 200 us of host time.
_SLICE = 20_000
# The most instructions between two looks at RFLAGS.IF while an interrupt waits for it.
_WINDOW_SLICE = 64
_TICK = 20  # ns an RDTSC or a port access takes

_PAGE = 4096
_FRAME = 0x000F_FFFF_FFFF_F000
_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE = 1, 2, 1 << 5, 1 << 6, 1 << 7
_DOUBLE_FAULT, _INVALID_TSS, _NOT_PRESENT, _STACK, _PROTECTION, _PAGE_FAULT = 8, 10, 11, 12, 13, 14
_INVALID_OPCODE = 6
_WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_INTERRUPT_GATE, _TRAP_GATE = 14, 15
_TF, _IF, _NT, _RF, _VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17
# Second words of the descriptors SYSCALL loads: flat 64-bit code and flat data, DPL 0.
_FLAT_CODE, _FLAT_DATA, _FLAT_LIMIT = 0x00AF9B00, 0x00CF9300, 0xFFFFFFFF
_SYSCALL_LENGTH = 2
_MSR_TSC_AUX = 0xC0000103
_HLT, _STI = 0xF4, 0xFB
_TSC_HZ = TSC_KHZ * 1000
_CR4_COPIES = {1: (1 << 27, 1 << 18), 7: (1 << 4, 1 << 22)}  # leaf: bit of ECX and of CR4, for OSXSAVE and OSPKE
_GENUINE_INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX

Answer = tuple[int, int, int, int]


class _Fault(Exception):
    """An exception the guest gets while another event is being delivered."""

    def __init__(self, vector: int, error_code: int, address: int | None = None) -> None:
        super().__init__(vector, error_code)
        self.vector = vector
        self.error_code = error_code
        self.address = address


@cache
def _prepared() -> dict[int, Answer]:
    """Prove the context's offsets, once a process, and return the CPUID leaves with our features in them."""
    engine = Engine()
    page = ctypes.create_string_buffer(2 * _PAGE)
    start = -ctypes.addressof(page) % _PAGE
    code = memoryview(page)[start : start + _PAGE].cast("B")
    try:
        engine.map_host_memory(_PAGE, _PAGE, ctypes.addressof(page) + start)
        code[:3] = b"\x0f\xa2\xf4"  # cpuid; hlt
        leaves = {}
        for leaf in sorted({word[1] for word in FEATURE_WORDS.values()}):
            engine.write("rax", leaf)
            engine.write("rcx", 0)
            error = engine.start(_PAGE, 2)
            if error:
                raise UnicornError("CPUID", error)
            answer = {register: engine.read(register) for register in ("rax", "rbx", "rcx", "rdx")}
            for name, (_, at, register) in FEATURE_WORDS.items():
                if at == leaf:
                    answer[register] = answer[register] & ~FEATURES_OFF.get(name, 0) | FEATURES_ON.get(name, 0)
            leaves[leaf] = (answer["rax"], answer["rbx"], answer["rcx"], answer["rdx"])
        saved.verify(engine, code, _PAGE)
    finally:
        engine.close()
    # The same as native/core.c: frequencies of TSC, APIC timer and processor, and nothing in the leaves before them.
    leaves |= dict.fromkeys(range(0xE, 0x15), (0, 0, 0, 0))
    ebx, ecx, edx = _GENUINE_INTEL
    leaves[0] = (0x16, ebx, ecx, edx)
    leaves[0x15] = (1, 1, _TSC_HZ, 0)
    leaves[0x16] = (_TSC_HZ // 1_000_000, _TSC_HZ // 1_000_000, 100, 0)
    return leaves


class PureCPU(UnicornCPU):
    """A CPU of the machine (see `interface.CPU`). Any number of them a process.

    A trap must be where a block begins, as a function does: a second hook on instructions, next to the one that
    counts them, makes all of them half as fast.
    """

    TRAP_HOOK = HOOK_BLOCK

    def __init__(self, ports: PortIO, index: int = 0) -> None:
        super().__init__(ports, index)
        self._cpuid = _prepared()
        self._context = Context(self.engine)
        self._ram: list[tuple[int, memoryview]] = []
        self._base = 0  # virtual time at the start of the slice, ns
        self._slice = 0
        self._within = 0  # ticks taken in the slice, below its length
        self._deadline = 0
        self._cut = False  # the slice was ended from inside
        self._hypercall = False
        self._stop_word = False
        self._poll = select.poll()
        self._watched: tuple[int, ...] = ()
        self._halts: set[int] = set()  # virtual addresses of HLT instructions, hooked
        self._halting = -1
        self.engine.hook_ports(self._timed_port_read, self._timed_port_write)
        self._hook_instructions()

    def _hook_instructions(self) -> None:
        hook = self.engine.hook
        plain = CFUNCTYPE(None, c_void_p, c_void_p)
        answering = CFUNCTYPE(c_int, c_void_p, c_void_p)
        hook(HOOK_INTR, CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)(lambda _uc, vector, _: self._exception(vector)))
        hook(HOOK_INSN_INVALID, answering(lambda _uc, _: self._exception(_INVALID_OPCODE)))
        hook(HOOK_INSN, plain(lambda _uc, _: self._syscall()), instruction=INS_SYSCALL)
        hook(HOOK_INSN, answering(lambda _uc, _: self._rdtsc()), instruction=INS_RDTSC)
        hook(HOOK_INSN, answering(lambda _uc, _: self._rdtscp()), instruction=INS_RDTSCP)
        hook(HOOK_INSN, answering(lambda _uc, _: self._answer_cpuid()), instruction=INS_CPUID)
        self._on_halt = CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)(
            lambda _uc, address, _size, _: setattr(self, "_halting", address)
        )

    # ---- time

    @property
    def now(self) -> int:
        return self._base + self._within

    @now.setter
    def now(self, ns: int) -> None:
        self._base = ns

    def _tick(self) -> int:
        self._within = max(min(self._within + _TICK, self._slice - 1), self._within)
        return self._base + self._within

    def _timed_port_read(self, port: int, size: int) -> int:
        self._tick()
        return self._port_read(port, size)

    def _timed_port_write(self, port: int, size: int, value: int) -> None:
        self._tick()
        self._port_write(port, size, value)

    def _rdtsc(self) -> int:
        now = self._tick()
        self.engine.write("rax", now & 0xFFFFFFFF)
        self.engine.write("rdx", now >> 32)
        return 1

    def _rdtscp(self) -> int:
        self.engine.write("rcx", self.engine.read_msr(_MSR_TSC_AUX) & 0xFFFFFFFF)
        return self._rdtsc()

    # ---- running

    @property
    def interruptible(self) -> bool:
        state = self._context
        state.save()
        return bool(state.u32(saved.EFLAGS) & _IF) and not state.u32(saved.HFLAGS) & saved.HF_INHIBIT_IRQ

    def run(self, deadline_ns: int, *, vector: int | None = None, window: bool = False) -> Stop:
        self._deadline = deadline_ns
        self._hypercall = False
        if vector is not None:
            self._context.save()
            self._deliver(vector)
        step = 1
        while True:
            if window and self.interruptible:
                return Stop.WINDOW
            left = self._deadline - self._base
            if left <= 0:
                return Stop.DEADLINE
            if self._stop_word:
                self._stop_word = False
                return Stop.STOPPED
            if self._watched and self._poll.poll(0):
                return Stop.READY
            count = min(left, _SLICE)
            if window:
                count, step = min(count, step), min(2 * step, _WINDOW_SLICE)
            halted = self._run_slice(count)
            if self._take_trap():
                return Stop.TRAP
            if self._hypercall:
                return Stop.HYPERCALL
            if halted:
                return Stop.HALTED

    def _run_slice(self, count: int) -> bool:
        """Execute up to `count` instructions, let the clock follow and say whether the CPU stopped at a HLT."""
        self._slice, self._within = count, 0
        self._cut, self._halting = False, -1
        begin = self.engine.read("rip")
        error = self.engine.start(begin, count)
        self._raise_fault()
        if error:
            what = self.engine.lib.uc_strerror(error).decode()
            raise GuestDied(f"the guest's CPU stopped at {self.read('rip'):#x}: {what}")
        halted = not self._cut and self._is_halted(begin, count)
        self._base += self._within if self._cut or halted else count
        self._slice = self._within = 0
        return halted

    def _is_halted(self, begin: int, count: int) -> bool:
        """Did the slice end with HLT rather than by its count? The engine does not say.

        Behind a HLT met before, a hook on the block it begins has seen it execute. The first time, STI; HLT is
        believed, which is what an idle kernel does. Any other byte that looks like HLT is not: should it have been
        one, the CPU goes on behind it, as after an SMI, and the loop an idle CPU sits in brings it to the hook.
        """
        state = self._context
        state.save()
        halt = state.u64(saved.RIP) - 1
        if state.u32(saved.HFLAGS) & saved.HF_CPL:
            return False
        if halt in self._halts:
            return self._halting == halt
        try:
            before, byte = self._read(halt - 1, 2)
        except (_Fault, GuestDied):
            return False
        if byte != _HLT:
            return False
        self._halts.add(halt)
        self.engine.hook(HOOK_BLOCK, self._on_halt, halt, halt)
        self.engine.forget_code(halt, halt + 1)
        return halt == begin if count == 1 else before == _STI

    def step(self) -> Stop | None:
        raise EmulatorError("this CPU executes no single instructions: use the native one")

    def shorten(self, deadline_ns: int) -> None:
        if deadline_ns < self._deadline:
            self._deadline = deadline_ns
        if self._deadline < self._base + self._slice:
            self._end_slice()

    def _end_slice(self) -> None:
        self._cut = True
        self.engine.stop()

    def _on_trap(self, address: int) -> None:
        super()._on_trap(address)
        self._cut = self._cut or self.trapped is not None

    def _fail(self, error: BaseException) -> None:
        self._cut = True
        super()._fail(error)

    def stop(self) -> None:
        self._stop_word = True

    def watch(self, fds: Sequence[int]) -> None:
        if len(fds) > MAX_WATCHED:
            raise ValueError(f"at most {MAX_WATCHED} descriptors can be watched")
        self._watched = tuple(fds)
        self._poll = select.poll()
        for fd in fds:
            self._poll.register(fd, select.POLLIN)

    # ---- what the engine asks for

    def _answer_cpuid(self) -> int:
        """Answer the leaves that differ from the engine's; the others are left to it."""
        leaf, subleaf = self.engine.read("rax") & 0xFFFFFFFF, self.engine.read("rcx") & 0xFFFFFFFF
        if leaf == HYPERCALL_LEAF:
            self._hypercall = True
            self._end_slice()
            return 1
        answer = self._cpuid.get(leaf)
        if answer is None or (leaf == 7 and subleaf):
            return 0
        eax, ebx, ecx, edx = answer
        if leaf in _CR4_COPIES:
            bit, cr4_bit = _CR4_COPIES[leaf]
            ecx = ecx | bit if self.engine.read("cr4") & cr4_bit else ecx & ~bit
        for register, value in (("rax", eax), ("rbx", ebx), ("rcx", ecx), ("rdx", edx)):
            self.engine.write(register, value)
        return 1

    def _exception(self, vector: int) -> int:
        self._halting = -1
        state = self._context
        try:
            state.save()
            software = bool(state.u32(saved.IS_SOFTWARE)) and vector != _INVALID_OPCODE
            with_code = vector in _WITH_ERROR_CODE and not software
            self._deliver(vector, state.u32(saved.ERROR_CODE) if with_code else None, software)
        except BaseException as error:
            self._fail(error)
        return 1

    def _syscall(self) -> None:
        """SYSCALL in 64-bit mode (Intel SDM vol. 2B). Unicorn steps over the instruction itself afterwards."""
        try:
            state = self._context
            state.save()
            rflags = self.engine.read("rflags")
            state.set_u64(saved.RCX, state.u64(saved.RIP) + _SYSCALL_LENGTH)
            state.set_u64(saved.R11, rflags)
            selector = state.u64(saved.STAR) >> 32 & 0xFFFC
            state.set_segment(saved.CS, selector, _FLAT_LIMIT, _FLAT_CODE)
            state.set_segment(saved.SS, selector + 8, _FLAT_LIMIT, _FLAT_DATA)
            state.set_u32(saved.HFLAGS, state.u32(saved.HFLAGS) & ~saved.HF_CPL)
            state.set_u64(saved.RIP, state.u64(saved.LSTAR) - _SYSCALL_LENGTH & (1 << 64) - 1)
            state.restore()
            self.engine.write("rflags", rflags & ~state.u64(saved.FMASK) & ~_RF | 2)
        except BaseException as error:
            self._fail(error)

    # ---- delivery

    def _deliver(self, vector: int, error_code: int | None = None, software: bool = False) -> None:
        """Enter the handler of an exception or interrupt; the context is freshly saved and goes back changed.

        What fails on the way becomes an exception of its own, or a double fault (SDM vol. 3, table 6-5).
        Raises GuestDied for a triple fault.
        """
        raised = error_code is not None or (vector < 32 and not software)
        while True:
            try:
                self._enter(vector, error_code, software)
                return
            except _Fault as fault:
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
        rflags = self.engine.read("rflags")
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
        state.set_segment(saved.CS, selector & ~3 | dpl, _FLAT_LIMIT, code_flags)
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
            raise _Fault(_PROTECTION, error)
        low, high = struct.unpack("<2Q", self._read(base + 16 * vector, 16))
        gate_type = low >> 40 & 0x1F
        if gate_type not in (_INTERRUPT_GATE, _TRAP_GATE) or low >> 45 & 3 < cpl:
            raise _Fault(_PROTECTION, error)
        if not low >> 47 & 1:
            raise _Fault(_NOT_PRESENT, error)
        handler = low & 0xFFFF | low >> 32 & 0xFFFF0000 | (high & 0xFFFFFFFF) << 32
        return handler, low >> 16 & 0xFFFF, low >> 32 & 7, gate_type

    def _code_segment(self, selector: int, cpl: int) -> tuple[int, int]:
        """Return the second word of a 64-bit code descriptor in the GDT and the privilege level it leads to."""
        base, limit = self._table(saved.GDTR)
        error = selector & 0xFFFC
        if not error or selector & 4 or (selector | 7) > limit:
            raise _Fault(_PROTECTION, error)
        flags = int.from_bytes(self._read(base + (selector & ~7) + 4, 4), "little")
        dpl = flags >> 13 & 3
        is_code, is_long = flags & 0x1800 == 0x1800, flags >> 21 & 3 == 1
        if not is_code or not is_long or dpl > cpl:
            raise _Fault(_PROTECTION, error)
        if not flags >> 15 & 1:
            raise _Fault(_NOT_PRESENT, error)
        return flags, cpl if flags >> 10 & 1 else dpl

    def _stack_pointer(self, index: int) -> int:
        """Return RSP0..2 (index 0..2) or IST1..7 (index 4..10) of the task state segment."""
        base, limit = self._table(saved.TR)
        if 8 * index + 11 > limit:
            raise _Fault(_INVALID_TSS, 0)
        return int.from_bytes(self._read(base + 8 * index + 4, 8), "little")

    def _table(self, register: int) -> tuple[int, int]:
        return self._context.u64(register + saved.BASE), self._context.u32(register + saved.LIMIT)

    # ---- guest memory, as the CPU itself sees it when delivering (supervisor accesses)

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        super().map_ram(physical, size, host_address)
        self._ram.append((physical, memoryview((ctypes.c_char * size).from_address(host_address)).cast("B")))

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
                raise _Fault(_PAGE_FAULT, error, virtual)
            if write and not entry & _WRITABLE:
                raise _Fault(_PAGE_FAULT, error | 1, virtual)
            leaf = shift == 12 or (shift < 39 and entry & _LARGE)
            used = entry | _ACCESSED | (_DIRTY if leaf and write else 0)
            if used != entry:
                cell[:] = used.to_bytes(8, "little")
            if leaf:
                below = (1 << shift) - 1
                return entry & _FRAME & ~below | virtual & below
            table = entry & _FRAME
        raise AssertionError

    def _read(self, virtual: int, size: int) -> bytes:
        first = min(size, _PAGE - virtual % _PAGE)
        data = bytes(self._physical(self._translate(virtual, False), first))
        return data if first == size else data + self._read(virtual + first, size - first)

    def _write(self, virtual: int, data: bytes) -> None:
        if virtual + (1 << 47) & (1 << 64) - 1 >= 1 << 48:
            raise _Fault(_STACK, 0)
        first = min(len(data), _PAGE - virtual % _PAGE)
        self._physical(self._translate(virtual, True), first)[:] = data[:first]
        if first < len(data):
            self._write(virtual + first, data[first:])

    # ---- state

    def start_at(self, entry: int, registers: dict[str, int], gdt: tuple[int, int], code: int, data: int) -> None:
        self.engine.write_table("gdtr", *gdt)
        for name in ("cr4", "cr3", "cr0"):
            self.engine.write(name, registers.pop(name))
        self._context.save()
        self._context.set_segment(saved.CS, code, _FLAT_LIMIT, _FLAT_CODE)
        for number in (saved.ES, saved.SS, saved.DS):
            self._context.set_segment(number, data, _FLAT_LIMIT, _FLAT_DATA)
        self._context.restore()
        for name, value in registers.items():
            self.write(name, value)
        self.write("rip", entry)

    def close(self) -> None:
        for _, view in self._ram:
            view.release()
        self._ram.clear()
        self._context.close()
        super().close()
