"""Where Unicorn 2.1.4 keeps the CPU's state, and the proof that it does.

Native code reads and writes a few fields of QEMU's `CPUX86State` ("env") and `CPUState` ("cpu") directly. Their
offsets belong to one version and one build, so nothing is believed: `find()` writes known values through the public
API, or lets the CPU do something, and looks for the result at each place. A place that does not hold is a
LayoutError and the native CPU is not used. The public-API CPU (`emulator.cpu.pure`) needs none of this.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from emulator.cpu.libunicorn import WANTED_VERSION, Engine, address
from emulator.errors import EmulatorError

_UC_CPU = 440
_CPU_ENV = 296
_CPU_INTERRUPT_REQUEST = 28
_CPU_HALTED = 33176
_CPU_ICOUNT = 304
_ICOUNT_WITHIN = 64  # bytes: the word it points to lies just below env
# QEMU's order of the general registers in env->regs.
REGS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_EIP = 128
_EFLAGS = 136
_HFLAGS = 176
_SEGS = 184
SEGMENT_SIZE = 24
_STAR = 4824
_LSTAR = 4840
_FMASK = 4856
_TSC_AUX = 4896
_FEATURES = 5632
_MSR_STAR, _MSR_LSTAR, _MSR_FMASK, _MSR_TSC_AUX = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000103
# hflags bits (QEMU's target/i386/cpu.h): long mode active and 64-bit code segment.
_HF_LMA_CS64 = 1 << 14 | 1 << 15
_HF_TS = 1 << 11
_CR0_TS = 1 << 3
_INTERRUPT_HARD = 2
_SCRATCH = 0xFFFF_F000  # physical page for the few instructions run here; no RAM is mapped there

# CPUID feature words: name -> (index in env->features, CPUID leaf, output register).
FEATURE_WORDS = {
    "1.edx": (0, 1, "rdx"),
    "1.ecx": (1, 1, "rcx"),
    "7.ebx": (2, 7, "rbx"),
    "80000007.edx": (8, 0x80000007, "rdx"),
    "6.eax": (20, 6, "rax"),
}
# A bit of each word that can be flipped without meaning anything to the few instructions run here.
_PROBE_BIT = {"1.edx": 9, "1.ecx": 30, "7.ebx": 18, "80000007.edx": 8, "6.eax": 2}


class LayoutError(EmulatorError):
    """Unicorn's private structures are not where 2.1.4 has them."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this build of Unicorn keeps {what} elsewhere than {WANTED_VERSION} does: "
            f"pip install --force-reinstall unicorn=={WANTED_VERSION}"
        )


@dataclass(frozen=True)
class Layout:
    """Host addresses and offsets (bytes) that were found to hold for one engine."""

    cpu: int
    env: int
    exec_interrupt_slot: int
    exit_request: int  # the address of a word that is negative when the CPU is to leave translated code
    eip: int = _EIP
    eflags: int = _EFLAGS
    hflags: int = _HFLAGS
    segs: int = _SEGS
    star: int = _STAR
    lstar: int = _LSTAR
    fmask: int = _FMASK
    tsc_aux: int = _TSC_AUX
    cpu_halted: int = _CPU_HALTED
    cpu_interrupt_request: int = _CPU_INTERRUPT_REQUEST

    def feature_word(self, name: str) -> int:
        """Return the host address of a CPUID feature word (64 bits, the upper half unused)."""
        return self.env + _FEATURES + 8 * FEATURE_WORDS[name][0]


class _Memory:
    """This process's memory, read so that a wrong pointer is an error and not a crash."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, host_address: int, size: int, what: str) -> bytes:
        try:
            data = os.pread(self.fd, size, host_address)
        except (OSError, OverflowError) as error:
            raise LayoutError(what) from error
        if len(data) != size:
            raise LayoutError(what)
        return data

    def u64(self, host_address: int, what: str) -> int:
        return int(struct.unpack("<Q", self.read(host_address, 8, what))[0])

    def close(self) -> None:
        os.close(self.fd)


def find(engine: Engine) -> Layout:
    """Verify every private offset on a fresh engine and return them; the engine's state is left as it was.

    Raises LayoutError naming the first thing that is elsewhere.
    """
    memory = _Memory()
    saved = engine.context_alloc()
    engine.context_save(saved)
    page = ctypes.create_string_buffer(2 * 4096)
    code = ctypes.addressof(page) + (-ctypes.addressof(page) & 4095)
    engine.map_host_memory(_SCRATCH, 4096, code)
    try:
        assert engine.handle.value is not None
        cpu = memory.u64(engine.handle.value + _UC_CPU, "its CPU")
        env = memory.u64(cpu + _CPU_ENV, "the CPU's registers")
        _check_registers(engine, memory, env)
        _check_flags(engine, memory, env)
        _check_segments_and_msrs(engine, memory, env)
        slot = _find_exec_interrupt(memory, cpu)
        layout = Layout(cpu, env, slot, _find_exit_request(memory, cpu, env))
        _check_features(engine, layout, code)
        _check_running(engine, memory, layout, code)
        return layout
    finally:
        engine.context_restore(saved)
        engine.lib.uc_context_free(saved)
        engine.lib.uc_mem_unmap(engine.handle, ctypes.c_uint64(_SCRATCH), ctypes.c_size_t(4096))
        memory.close()


def _check_registers(engine: Engine, memory: _Memory, env: int) -> None:
    for index, name in enumerate(REGS):
        engine.write(name, 0x0123_4567_89AB_0000 + index)
    found = struct.unpack("<16Q", memory.read(env, 128, "the general registers"))
    if found != tuple(0x0123_4567_89AB_0000 + index for index in range(16)):
        raise LayoutError("the general registers")
    engine.write("rip", 0x7654_3210)
    if memory.u64(env + _EIP, "RIP") != 0x7654_3210:
        raise LayoutError("RIP")


def _check_flags(engine: Engine, memory: _Memory, env: int) -> None:
    for interrupts in (0, 0x200):
        engine.write("rflags", 2 | interrupts)
        if memory.u64(env + _EFLAGS, "RFLAGS") & 0x200 != interrupts:
            raise LayoutError("RFLAGS")
    cr0 = engine.read("cr0")
    for task_switched in (_CR0_TS, 0):
        engine.write("cr0", cr0 & ~_CR0_TS | task_switched)
        hflags = memory.u64(env + _HFLAGS, "hflags") & 0xFFFF_FFFF
        if hflags & _HF_LMA_CS64 != _HF_LMA_CS64 or bool(hflags & _HF_TS) != bool(task_switched) or hflags & 3:
            raise LayoutError("hflags")
    engine.write("cr0", cr0)


def _check_segments_and_msrs(engine: Engine, memory: _Memory, env: int) -> None:
    for index, name in ((4, "fs_base"), (5, "gs_base")):
        engine.write(name, 0x1234_5678_9000 + index)
        if memory.u64(env + _SEGS + SEGMENT_SIZE * index + 8, "segments") != 0x1234_5678_9000 + index:
            raise LayoutError("the segment registers")
    for msr, offset in ((_MSR_STAR, _STAR), (_MSR_LSTAR, _LSTAR), (_MSR_FMASK, _FMASK), (_MSR_TSC_AUX, _TSC_AUX)):
        engine.write_msr(msr, 0x0055_0000 | msr & 0xFFFF)
        if memory.u64(env + offset, "MSRs") != 0x0055_0000 | msr & 0xFFFF:
            raise LayoutError(f"MSR {msr:#x}")


def _find_exec_interrupt(memory: _Memory, cpu: int) -> int:
    """Return the host address of the class member that points to x86_cpu_exec_interrupt()."""
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    size = int(usable(cpu))
    wanted = struct.pack("<Q", address("x86_cpu_exec_interrupt_x86_64"))
    data = memory.read(cpu, size, "the CPU object")
    at = data.find(wanted)
    if at < 0 or at % 8 or data.find(wanted, at + 1) >= 0:
        raise LayoutError("its interrupt routine")
    return cpu + at


def _find_exit_request(memory: _Memory, cpu: int, env: int) -> int:
    at = memory.u64(cpu + _CPU_ICOUNT, "the instruction counter")
    if not env - _ICOUNT_WITHIN <= at < env:
        raise LayoutError("the instruction counter")
    return at


def _check_features(engine: Engine, layout: Layout, code: int) -> None:
    ctypes.memmove(code, b"\x0f\xa2\xf4", 3)  # cpuid; hlt
    for name, (_, leaf, register) in FEATURE_WORDS.items():
        word = ctypes.c_uint64.from_address(layout.feature_word(name))
        before = word.value
        for bit in (0, 1 << _PROBE_BIT[name]):
            word.value = before & ~(1 << _PROBE_BIT[name]) | bit
            engine.write("rax", leaf)
            engine.write("rcx", 0)
            if engine.start(_SCRATCH) or engine.read(register) & 1 << _PROBE_BIT[name] != bit:
                raise LayoutError(f"CPUID word {name}")
        word.value = before


def _check_running(engine: Engine, memory: _Memory, layout: Layout, code: int) -> None:
    """HLT sets `halted`; an interrupt request is looked at, in the class member found, before anything runs.

    Nothing is written to a place before what it holds has been seen to be right.
    """
    for instruction, wanted in ((b"\x0f\x0b", 0), (b"\xf4", 1)):  # UD2, at which the engine gives up; HLT
        ctypes.memmove(code, instruction, len(instruction))
        engine.flush_translations()
        engine.start(_SCRATCH)
        halted = memory.read(layout.cpu + layout.cpu_halted, 4, "the halted flag")
        if int.from_bytes(halted, "little") != wanted:
            raise LayoutError("the halted flag")
    at = layout.cpu + layout.cpu_interrupt_request
    if memory.read(at, 4, "the interrupt request word") != bytes(4):
        raise LayoutError("the interrupt request word")
    request = ctypes.c_uint32.from_address(at)
    slot = ctypes.c_void_p.from_address(layout.exec_interrupt_slot)
    exit_request = ctypes.c_int32.from_address(layout.exit_request)
    seen: list[int] = []
    asked: list[bool] = []

    def called(cpu: int, pending: int) -> bool:
        seen.append(cpu)
        request.value = request.value & ~pending
        asked.append(exit_request.value < 0)
        engine.stop()
        asked.append(exit_request.value < 0)
        return False

    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int)(called)
    original = slot.value
    try:
        slot.value = ctypes.cast(callback, ctypes.c_void_p).value
        request.value = _INTERRUPT_HARD
        engine.start(_SCRATCH)
    finally:
        slot.value = original
        request.value = 0
    if seen != [layout.cpu]:
        raise LayoutError("the interrupt request word")
    if asked != [False, True]:
        raise LayoutError("the instruction counter")
