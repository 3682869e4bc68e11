"""The slow CPU: Unicorn through its public API alone, everything a PC adds done here in Python.

The fallback where `native` cannot work, and the twin it is checked against. Exceptions, interrupts (`delivery`) and
SYSCALL are delivered by changing a saved context. Unlike the native CPU's, its clock counts instructions, 1 ns each, in
slices: a slice that ends early counts only the ticks its RDTSC reads and port accesses took. Both clocks are
deterministic, but they are different clocks.
"""

from __future__ import annotations

import ctypes
import select
from collections.abc import Sequence
from ctypes import CFUNCTYPE, c_int, c_uint32, c_uint64, c_void_p
from functools import cache

from emulator.cpu import context as saved
from emulator.cpu.context import Context
from emulator.cpu.delivery import FLAT_LIMIT, Delivery, Fault
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
_INVALID_OPCODE = 6
_WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
_IF, _RF = 1 << 9, 1 << 16
# Second words of the descriptors SYSCALL loads: flat 64-bit code and flat data, DPL 0.
_FLAT_CODE, _FLAT_DATA = 0x00AF9B00, 0x00CF9300
_SYSCALL_LENGTH = 2
_MSR_TSC_AUX = 0xC0000103
_HLT, _STI = 0xF4, 0xFB
_TSC_HZ = TSC_KHZ * 1000
_CR4_COPIES = {1: (1 << 27, 1 << 18), 7: (1 << 4, 1 << 22)}  # leaf: bit of ECX and of CR4, for OSXSAVE and OSPKE
_GENUINE_INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX

Answer = tuple[int, int, int, int]


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
        self._delivery = Delivery(self.engine, self._context)
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
            self._delivery.deliver(vector)
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
            before, byte = self._delivery.read(halt - 1, 2)
        except (Fault, GuestDied):
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
            self._delivery.deliver(vector, state.u32(saved.ERROR_CODE) if with_code else None, software)
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
            state.set_segment(saved.CS, selector, FLAT_LIMIT, _FLAT_CODE)
            state.set_segment(saved.SS, selector + 8, FLAT_LIMIT, _FLAT_DATA)
            state.set_u32(saved.HFLAGS, state.u32(saved.HFLAGS) & ~saved.HF_CPL)
            state.set_u64(saved.RIP, state.u64(saved.LSTAR) - _SYSCALL_LENGTH & (1 << 64) - 1)
            state.restore()
            self.engine.write("rflags", rflags & ~state.u64(saved.FMASK) & ~_RF | 2)
        except BaseException as error:
            self._fail(error)

    # ---- state

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        super().map_ram(physical, size, host_address)
        self._delivery.map_ram(physical, size, host_address)

    def start_at(self, entry: int, registers: dict[str, int], gdt: tuple[int, int], code: int, data: int) -> None:
        self.engine.write_table("gdtr", *gdt)
        for name in ("cr4", "cr3", "cr0"):
            self.engine.write(name, registers.pop(name))
        self._context.save()
        self._context.set_segment(saved.CS, code, FLAT_LIMIT, _FLAT_CODE)
        for number in (saved.ES, saved.SS, saved.DS):
            self._context.set_segment(number, data, FLAT_LIMIT, _FLAT_DATA)
        self._context.restore()
        for name, value in registers.items():
            self.write(name, value)
        self.write("rip", entry)

    def close(self) -> None:
        self._delivery.close()
        self._context.close()
        super().close()
